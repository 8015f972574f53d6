"""Numbers with the thing that they count, for messages."""


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """The number and its noun: `1 finding`, `2 findings`, `49,152 tokens`.

    Args:
        number: how many there are.
        singular: the noun for one.
        plural: the noun for any other number; by default the singular with an s.
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
