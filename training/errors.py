"""What the user of a program got wrong. Each module's own errors are kinds of these."""


class UserError(ValueError):
    """A mistake of the user's. The message says what was found and what would be right."""


class RecipeError(UserError):
    """A recipe or a command line that cannot be followed."""
