"""Errors that end a command with one readable line instead of a traceback."""


class StudyError(ValueError):
    """Something the user can put right; its text is one line."""

    code = 2  # of the command that it ends


class ConfigError(StudyError):
    """A bad configuration: names the field, what it held and what is allowed."""


class LedgerLost(StudyError):
    """The ledger's database stayed out: the run was interrupted, and can be gone on with."""

    code = 130
