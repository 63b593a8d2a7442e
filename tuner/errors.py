"""Errors that end a command with one readable line instead of a traceback."""


class StudyError(ValueError):
    """Something the user can put right; its text is one line."""

    code = 2  # of the command that it ends


class ConfigError(StudyError):
    """A bad configuration: names the field, what it held and what is allowed."""


class LedgerLost(StudyError):
    """The ledger's database stayed out: the run was interrupted, and can be gone on with.

    Args:
        text: what happened, and the way on.
        no_room: whether the disk is full that the run folder lies on too.
    """

    code = 130

    def __init__(self, text: str, *, no_room: bool = False) -> None:
        super().__init__(text)
        self.no_room = no_room


class HeadLost(StudyError):
    """Ray's head has restarted without its state: the run was interrupted and can be resumed."""

    code = 130
