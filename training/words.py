"""Numbers in words."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """
    A number with its noun in the right form.

    Args:
        number: how many.
        noun: the noun for one.
        plural: its plural, if that is not the noun and an "s".
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
