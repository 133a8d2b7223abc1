"""The exceptions that a person can mend."""


class StudyError(Exception):
    """Wrong input, setting or environment; its message is one line: which file, what is wrong, what to do."""

    exit_code = 2


class StoppedError(StudyError):
    """Ended on request, its work so far saved; the message says where it stands and how to go on."""

    exit_code = 130  # what a shell gives a command that Ctrl-C ended
