"""The one exception that a person can mend."""


class StudyError(Exception):
    """Wrong input, setting or environment; its message is one line: which file, what is wrong, what to do."""
