"""Errors that end a command with one readable line instead of a traceback."""


class StudyError(ValueError):
    """Something the user can put right; its text is one line."""


class ConfigError(StudyError):
    """A bad configuration: names the field, what it held and what is allowed."""
