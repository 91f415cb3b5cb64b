"""Errors that the user can correct. Each module's own errors are subclasses of these."""


class UserError(ValueError):
    """A mistake of the user. The message says what was found and what would be right."""


class RecipeError(UserError):
    """A recipe or a command line with a wrong field or value."""


class DataError(UserError):
    """Unusable data. The message says where (file, row, column), what was found, and what would be right."""
