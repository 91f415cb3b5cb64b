"""Errors that the user can correct, and how an error is shown. Each module's own errors are subclasses of these."""

from huggingface_hub.errors import StrictDataclassError


class UserError(ValueError):
    """A mistake of the user. The message says what was found and what would be right."""


class RecipeError(UserError):
    """A recipe or a command line with a wrong field or value."""


class DataError(UserError):
    """Unusable data. The message says where (file, row, column), what was found, and what would be right."""


def message_of(error: BaseException) -> str:
    """
    The message of an error on one line.

    huggingface_hub's strict dataclasses, such as our config, put the name of a method before the message. It is left
    out.
    """
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
