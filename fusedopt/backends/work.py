"""Work that may run out of memory halfway, and be gone on with from there."""

from collections.abc import Callable, Iterator
from typing import Any

Part = Callable[[], Any]
"""A part of some work, which either writes and returns None, or returns parts to do in its place.

It takes all memory that it needs before it writes, so that it has done either everything or nothing. Iterating over
parts takes none, since an iterator that raises is at its end.
"""


class Work:
    """Parts that are done one after another; a call after one that raised begins with the part that raised.

    Attributes:
        begun: True if something has been written.
    """

    def __init__(self, *parts: Part, retire: Callable[[], object] = lambda: None) -> None:
        """`retire`: called after an error, with what the parts to come still need: others are to leave it alone."""
        self.begun = False
        self._open: list[Iterator[Part]] = [iter(parts)]
        self._next: Part | None = None
        self._retire = retire

    def __call__(self) -> None:
        try:
            while self._open:
                if self._next is None:
                    self._next = next(self._open[-1], None)
                if self._next is None:
                    self._open.pop()
                    continue
                parts = self._next()
                self._next = None
                if parts is None:
                    self.begun = True
                else:
                    self._open.append(iter(parts))
        except BaseException:
            self._retire()
            raise
