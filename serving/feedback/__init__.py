"""What answers were worth: joins the log of answers with what users did afterwards.

``reading`` reads both, ``joining`` finds out what was taken from which answer, ``measures`` compares the releases, and
``report`` puts it together and plots it.
"""
