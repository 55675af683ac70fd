"""Tables as text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], sides: str, gap: int = 3) -> list[str]:
    """Returns one line per row, with columns of equal width; `sides` has "<" or ">" for each, `gap` spaces between.

    Example:
        >>> print(*aligned([("", "mean"), ("first", "10"), ("second", "7")], "<>"), sep="\\n")
                 mean
        first      10
        second      7
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [(" " * gap).join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths)).rstrip() for row in rows]
