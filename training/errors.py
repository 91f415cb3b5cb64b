"""What the user of a program got wrong. Each module's own errors are kinds of these."""


class UserError(ValueError):
    """A mistake of the user's. The message says what was found and what would be right."""


class RecipeError(UserError):
    """A recipe or a command line that cannot be followed."""


class DataError(UserError):
    """Data that cannot be used: where it is (file, row, column), what was found, and what would be right."""
