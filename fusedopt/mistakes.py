"""Which of the classic mistakes explains the learning rates that a run used.

Each explanation is a guess at the step of the schedule that every optimizer step took its rate from, and holds only if
it fits all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Guesses are made up to so many: scheduler steps per optimizer step, and places that a schedule may have jumped to.
_MOST_STEPS_AT_ONCE = 16
_MOST_JUMPS = 32
# Fewer points fit almost any guess.
_FEWEST_POINTS = 3


@dataclass(frozen=True, eq=False)
class Run:
    """The rates that a run used, and those that were meant.

    Attributes:
        steps: Numbers of the optimizer steps, int64 of shape [n], one apart.
        recorded: Rates that were used, float64 of shape [n, param groups]; NaN where there was none.
        meant: From numbers of steps, shape [k], to the rates meant at them, shape [k, param groups].
        relative: Largest relative difference that counts as equal.
        initial: Rate of each param group that the schedule's factors multiply.
    """

    steps: np.ndarray
    recorded: np.ndarray
    meant: Callable[[np.ndarray], np.ndarray]
    relative: float
    initial: np.ndarray

    def differs(self, recorded: np.ndarray, expected: np.ndarray) -> np.ndarray:
        # Where a factor comes near 0, its rounding is still that of the numbers around 1 it was computed from.
        rounding = 1e-12 * np.abs(self.initial)
        return np.abs(recorded - expected) > self.relative * np.abs(expected) + rounding

    def fits(self, of_steps: np.ndarray, since: int = 0) -> bool:
        """Whether the optimizer steps from index `since` on used the rates meant at `of_steps`."""
        rows = self.recorded[since:]
        few = slice(0, None, max(1, len(rows) // 64))  # refutes most guesses
        return all(not self.differs(rows[part], self.meant(of_steps[part])).any() for part in (few, slice(None)))


def explain(run: Run, first: int) -> str | None:
    """The mistake that explains the whole run, with the way out; None if none does.

    Args:
        run: The run, with at least one step that used another rate than was meant.
        first: Index of the first such step.
    """
    if len(run.steps) < _FEWEST_POINTS:
        return None
    # In this order: in a linear warm-up, two steps at once are also twice the rate.
    guesses = (_never_stepped, _stepped_first, _several_at_once, _once_in_many, _scaled, _jumped)
    return next((sentence for guess in guesses if (sentence := guess(run, first))), None)


def _never_stepped(run: Run, first: int) -> str | None:
    expected = run.meant(run.steps)
    if np.any(run.recorded != run.recorded[0]) or np.all(expected == expected[0]):
        return None
    return "the rate never changed, so the scheduler is not stepped; call scheduler.step() after every optimizer.step()"


def _scaled(run: Run, first: int) -> str | None:
    expected = run.meant(run.steps)
    known = np.where(np.isnan(run.recorded), 0.0, np.abs(expected))
    largest = np.unravel_index(known.argmax(), known.shape)
    if expected[largest] == 0:
        return None
    scale = run.recorded[largest] / expected[largest]
    if run.differs(run.recorded, scale * expected).any():
        return None
    return f"all rates are {scale:.6g} times those of the schedule; give the optimizer the initial rate that was meant"


def _stepped_first(run: Run, first: int) -> str | None:
    if not run.fits(run.steps + 1):
        return None
    return "the scheduler is one step ahead; call optimizer.step() before scheduler.step()"


def _several_at_once(run: Run, first: int) -> str | None:
    start = run.steps[0]
    for times in range(2, _MOST_STEPS_AT_ONCE + 1):
        for ahead in range(times):  # how many of them come before the optimizer
            if run.fits(start + times * (run.steps - start) + ahead):
                return f"the scheduler is stepped {times} times per optimizer step; step it once"
    return None


def _once_in_many(run: Run, first: int) -> str | None:
    changed = np.any(run.recorded != run.recorded[0], axis=1)
    every = int(changed.argmax())
    start = run.steps[0]
    if every < 2 or not run.fits(start + (run.steps - start) // every):
        return None
    return f"the scheduler is stepped once in {every} optimizer steps, as if per epoch; step it after every one"


def _jumped(run: Run, first: int) -> str | None:
    step, going_on = run.steps[first], run.steps[first:] - run.steps[first]
    if len(going_on) < _FEWEST_POINTS:
        return None
    places = np.arange(run.steps[-1] + len(run.steps) + 1)
    like_it = places[~run.differs(run.recorded[first], run.meant(places)).any(axis=1)]
    nearest = like_it[np.argsort(np.abs(like_it - step), kind="stable")][:_MOST_JUMPS]
    for place in sorted(nearest, key=lambda place: place != 0):
        if not run.fits(place + going_on, since=first):
            continue
        if place == 0:
            return f"from step {step} on it starts anew; load the scheduler's state_dict on resume, or pass last_epoch"
        by = "1 step" if abs(place - step) == 1 else f"{abs(place - step)} steps"
        side = "ahead (stepped although the optimizer was not?)" if place > step else "behind (an older checkpoint?)"
        return f"from step {step} on the scheduler is {by} {side}; step and save both together"
    return None
