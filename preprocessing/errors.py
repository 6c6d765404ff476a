"""The error every stage raises for bad input."""


class InputError(Exception):
    """Input that cannot be used: one sentence that names the input and the remedy.

    The command line prints it and exits with code 2; anything else that escapes a stage is a fault of the program.
    """
