"""The drawing of one step, from `optimizer.step()` to memory: boxes under each other, as an SVG without a script."""

from collections.abc import Sequence
from html import escape
from textwrap import wrap

WIDTH, MARGIN, LINE, GAP = 520, 14, 19, 26
BLUE, ORANGE, GREY, INK = "#0072B2", "#E69F00", "#B4BBC3", "#1F2933"

STEP: Sequence[tuple[str, str, str]] = (
    (GREY, "optimizer.step()", "the closure; gradients are collected, and what a GradScaler left"),
    (
        BLUE,
        "Engine.step: checks",
        "options, gradients, states and shards must fit; after this phase nothing raises half-way",
    ),
    (BLUE, "Clipping", "with max_grad_norm or skip_nonfinite: reads each gradient once, writes one number"),
    (BLUE, "States", "follow their parameter to its device; those that are missing are made"),
    (
        BLUE,
        "One call per device and rule",
        "DTensors become local shards; param groups become sets of hyper-parameters",
    ),
    (
        ORANGE,
        "Launch table",
        "a row per tensor: addresses, size, step count. Copied to the device only if something changed",
    ),
    (
        ORANGE,
        "Launch 1: prologue",
        "one program per 128 rows, float64: step counts, bias corrections, the factor on the gradient",
    ),
    (ORANGE, "Launch 2: update", "one program per piece of a tensor, for all tensors of a dtype and alignment class"),
    (GREY, "Memory", "AdamW in float32: reads p, g, m, v; writes p, m, v. 28 bytes per parameter, each once"),
)
"""Colour, title and text of each box."""


def svg(boxes: Sequence[tuple[str, str, str]] = STEP) -> str:
    """Returns the drawing: readable on light and dark pages, and on a phone."""
    parts, y = [], MARGIN
    for number, (color, title, text) in enumerate(boxes):
        lines = wrap(text, 62)
        height = 2 * 9 + LINE * (1 + len(lines))
        if number:
            middle = WIDTH / 2
            parts.append(f'<path d="M{middle} {y - GAP + 3}v{GAP - 10}m-5 -6l5 7l5 -7" stroke="{INK}" fill="none"/>')
        parts.append(f'<rect x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="6" fill="#fff"')
        parts.append(f'stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{MARGIN + 14}" y="{y + 25}" font-weight="bold">{escape(title)}</text>')
        for i, line in enumerate(lines, start=1):
            parts.append(f'<text x="{MARGIN + 14}" y="{y + 25 + LINE * i}" font-size="14">{escape(line)}</text>')
        y += height + GAP
    height = y - GAP + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    style = f'font-family="Helvetica, Arial, sans-serif" font-size="15" fill="{INK}">'
    return "\n".join(
        [f"{head} {style}", f'<rect width="{WIDTH}" height="{height}" fill="#F7F8FA"/>', *parts, "</svg>\n"]
    )
