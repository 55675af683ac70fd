"""Watches examples run: counts them, says at once what fails, and ends what is shrunk for too long."""

import time
from collections.abc import Callable
from typing import Any


class Enough(BaseException):
    """A failure has been shrunk for long enough. No `Exception`, which hypothesis would take for another failure."""


class Watch:
    """Counts what runs, and follows the failure of a round until it is small or the time for that is over.

    Args:
        shrinking: for how many seconds a failure may be shrunk.
        every: seconds between two lines about it.
        clock: tells the seconds.

    Attributes:
        examples, steps: what has run, shrinking included.
        failing: the shortest failing example of the round, as lines of Python; empty while all pass.
        error: that of this example.
    """

    def __init__(
        self, shrinking: float = 120.0, every: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.examples = self.steps = 0
        self._shrinking, self._every, self._clock = shrinking, every, clock
        self.begin_round()

    def begin_round(self) -> None:
        """Forgets the failure of the last round."""
        self.failing: list[str] = []
        self.error: Exception | None = None
        self._example: list[str] = []
        self._said = ""
        self._found = self._told = 0.0
        self._tried = 0

    def begin_example(self) -> None:
        """Counts an example."""
        self._example = []
        self.examples += 1
        self._tried += 1
        self._look()

    def begin(self, call: str, arguments: dict[str, Any]) -> None:
        """Notes what the example does next."""
        self._look()
        self._example.append(f"{call}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})")

    def failed(self, error: Exception) -> None:
        """Notes that the example has failed; keeps the shortest one."""
        if not self.failing:
            self._found = self._told = self._clock()
            self._tried = 0
            self._said = f"{type(error).__name__}: {error}".splitlines()[0]
            self._say(f"failed, and is shrunk for {self._shrinking:.0f} s at most: {self._said}")
        if not self.failing or len("\n".join(self._example)) < len("\n".join(self.failing)):
            self.failing, self.error = self._example, error

    def _look(self) -> None:
        if not self.failing:
            return
        now = self._clock()
        if now - self._found > self._shrinking:
            raise Enough
        if now - self._told >= self._every:
            self._told = now
            self._say(
                f"shrinking for {now - self._found:.0f} s, {self._tried} examples tried, the shortest has "
                f"{len(self.failing)} lines: {self._said}"
            )

    def _say(self, line: str) -> None:
        print(f"{'':10}{line}", flush=True)
