"""The error that every stage raises for bad input."""


class InputError(Exception):
    """Input that cannot be used; the message is one sentence that names the input and the remedy.

    The command line prints it and exits with code 2. Any other exception that leaves a stage is a bug.
    """
