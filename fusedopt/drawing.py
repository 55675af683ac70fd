"""What all pictures have in common: colours that everybody can tell apart, and names that fit."""

from typing import Any

import numpy as np

# The Okabe-Ito palette, which colour-blind readers can distinguish; blue for what was meant, vermilion for mistakes.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31", "#404040"]
WRONG = "#D55E00"
NEUTRAL = "#404040"
DASHES = ["-", "--", ":", "-."]

MOST_DISTINCT = len(COLOURS) * len(DASHES)
"""Up to this many curves differ in colour or dash; more are coloured in their order."""

SMALL = 8.3
"""The text of legends, in points."""


def styles(number: int) -> list[dict[str, Any]]:
    """Returns colours and dashes of `number` curves, no two of them alike."""
    if number <= MOST_DISTINCT:
        return [
            {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS)]}
            for index in range(number)
        ]
    from matplotlib import colormaps

    table = colormaps["viridis"](np.linspace(0, 0.92, 256))[:, :3]  # the rest is too light for a white page
    places = np.linspace(0, len(table) - 1, number)
    channels = [np.interp(places, np.arange(len(table)), channel) for channel in table.T]
    return [{"color": tuple(map(float, colour)), "linestyle": "-"} for colour in zip(*channels)]


def text_width(text: str) -> float:
    """Returns the width of a text in a legend, in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=SMALL), ismath=False)[0]


def shortened(text: str, room: float) -> str:
    """Returns the text, without its middle if it is wider than `room`."""
    if text_width(text) <= room:
        return text
    kept = len(text)
    while kept > 3 and text_width(text[: kept // 2] + "…" + text[len(text) - kept // 2 :]) > room:
        kept -= 1 + kept // 20
    return text[: kept // 2] + "…" + text[len(text) - kept // 2 :]
