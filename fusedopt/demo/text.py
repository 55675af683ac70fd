"""The text of the demo: bytes, split into one part for training and one for validation."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_BYTES = 3_000_000
"""Size of the text from Python's standard library: more than the default demo sees, and read at once."""

LARGEST_TEXT = 256_000_000
"""Largest size of a user's text, which is held in memory."""


def read_text(path: str | None = None) -> bytes:
    """Returns the bytes of a file; without a path, of the sources of Python's standard library in order of their names.

    Raises:
        ValueError: the text does not exist or cannot be read.

    Example:
        >>> len(read_text()) <= DEFAULT_BYTES
        True
    """
    if path is None:
        return _standard_library()
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_TEXT)
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}; give a readable file") from error


def _standard_library() -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for source in sorted(folder.glob("*.py")):
        if len(text) >= DEFAULT_BYTES:
            break
        try:
            text += source.read_bytes()
        except OSError:
            continue
    if not text:
        raise ValueError(f"this Python has no sources of its library in {folder}; give a text of your own")
    return bytes(text[:DEFAULT_BYTES])


class Text:
    """Windows of `context` bytes (tokens), and the same windows one byte later (targets).

    Args:
        text: the last tenth is held out for validation.
        context: length of a window.

    Raises:
        ValueError: one of the two parts is shorter than a window.

    Example:
        >>> text = Text(bytes(range(200)), context=4)
        >>> tokens, targets = text.held_out(windows=2)
        >>> tokens.tolist(), targets.tolist()
        ([[180, 181, 182, 183], [195, 196, 197, 198]], [[181, 182, 183, 184], [196, 197, 198, 199]])
    """

    def __init__(self, text: bytes, context: int) -> None:
        held_out = len(text) // 10
        if held_out < context + 1:
            raise ValueError(
                f"the text has {len(text)} bytes, too few to train and to validate on: {10 * (context + 1)} are needed"
            )
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._train, self._held_out = (part.unfold(0, context + 1, 1) for part in (data[:-held_out], data[-held_out:]))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns tokens and targets of `size` windows from random places, int64 [size, context]."""
        last = len(self._train)
        return _shifted(self._train[torch.randint(last, (size,), generator=generator, dtype=torch.int64, device="cpu")])

    def held_out(self, windows: int) -> tuple[Tensor, Tensor]:
        """Returns tokens and targets of `windows` windows, spread evenly over the validation part; always the same."""
        # In integers: float32 rounds the places of a long text, perhaps past its end.
        last, gaps = len(self._held_out) - 1, max(1, windows - 1)
        return _shifted(self._held_out[torch.arange(windows, dtype=torch.int64, device="cpu") * last // gaps])


def _shifted(windows: Tensor) -> tuple[Tensor, Tensor]:
    windows = windows.long()
    return windows[:, :-1], windows[:, 1:]
