"""Errors that end a command with one readable line instead of a traceback."""


class StudyError(ValueError):
    """An error that the user can correct; its text is one line."""

    code = 2  # exit code of the command that it ends


class ConfigError(StudyError):
    """A bad configuration; the text names the field, its value and the allowed values."""


class LedgerLost(StudyError):
    """The ledger's database was unavailable for too long; the interrupted run can be resumed.

    Args:
        text: what happened and how to continue.
        no_room: whether the disk that also holds the run folder is full.
    """

    code = 130

    def __init__(self, text: str, *, no_room: bool = False) -> None:
        super().__init__(text)
        self.no_room = no_room


class HeadLost(StudyError):
    """Ray's head has restarted without its state: the run was interrupted and can be resumed."""

    code = 130
