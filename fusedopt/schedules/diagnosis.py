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
# So many irregularities are told one by one; more, or one in every third step, are no explanation.
_MOST_IRREGULAR = 32


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


def explain(run: Run) -> str | None:
    """The mistake that explains the whole run, with the way out; None if none does, or if all rates are as meant."""
    wrong = run.differs(run.recorded, run.meant(run.steps)).any(axis=1)
    if len(run.steps) < _FEWEST_POINTS or not wrong.any():
        return None
    first = int(wrong.argmax())
    # In this order: in a linear warm-up, two steps at once are also twice the rate.
    guesses = (_resumed, _never_stepped, _stepped_first, _several_at_once, _once_in_many, _scaled, _jumped, _irregular)
    return next((sentence for guess in guesses if (sentence := guess(run, first))), None)


def _resumed(run: Run, first: int) -> str | None:
    """The rate of the first step comes with the optimizer's state, whatever arguments the schedule has now."""
    step = int(run.steps[0])
    if step == 0 or not run.fits(run.steps[1:], since=1):
        return None
    return (
        "only the first one after the resume, which has the rate of the checkpoint: the schedule was saved with other "
        f"arguments; to begin with those given now, pass last_epoch={step - 1} instead of loading the scheduler's state"
    )


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
        if place > step and first == 0:
            return _late_start(step, place)
        if _twice(step, place):
            return _counted_twice(step, place)
        side = "ahead (stepped although the optimizer was not?)" if place > step else "behind (an older checkpoint?)"
        return f"from step {step} on the scheduler is {by} {side}; step and save both together"
    return None


def _late_start(step: int, place: int) -> str:
    if _twice(step, place):
        return _counted_twice(step, place)
    return (
        f"the record starts with the rate of step {place}, not {step}; pass first_step={place} to LRRecorder if the "
        f"run goes on from there, else step the scheduler only after an applied optimizer.step() (an overflow?)"
    )


def _twice(step: int, place: int) -> bool:
    """Whether the place is that of twice as many steps; with few of them it says nothing."""
    return step > 4 and abs(place - 2 * step) <= 1


def _counted_twice(step: int, place: int) -> str:
    return (
        f"from step {step} on the scheduler is at step {place}, so the steps before counted twice; on resume load its "
        "state_dict, or pass last_epoch, or step it forward, but only one of them"
    )


def _irregular(run: Run, first: int) -> str | None:
    """A run whose scheduler was mostly right, or always wrong in the same way but for the windows' ends."""
    places = _places(run)
    if places is None:
        return None
    by = np.diff(places, prepend=run.steps[0] - 1)
    # A rate that is the last one for good does not say at which step it was taken.
    moving = np.flatnonzero(np.any(run.recorded != run.recorded[-1], axis=1))
    known = by[: moving[-1] + 1] if len(moving) else by
    return _several_since(run, known) or _uneven_windows(known) or _piece_by_piece(run, places, by)


def _places(run: Run) -> np.ndarray | None:
    """Steps of the schedule that the optimizer steps took their rates from; None if a rate is nowhere in reach.

    Of several that have the rate, the one nearest to what comes after the last.
    """
    number = len(run.steps)
    places = np.empty(number, dtype=np.int64)
    last, done, ahead = int(run.steps[0]) - 1, 0, 16
    everywhere: np.ndarray | None = None
    while done < number:
        going_on = last + 1 + np.arange(min(ahead, number - done))
        wrong = run.differs(run.recorded[done : done + len(going_on)], run.meant(going_on)).any(axis=1)
        right = int(wrong.argmax()) if wrong.any() else len(going_on)
        places[done : done + right] = going_on[:right]
        last, done, ahead = last + right, done + right, 2 * ahead
        if right == len(going_on):
            continue
        ahead = 16
        reach = np.arange(max(last, 0), last + 1 + _MOST_STEPS_AT_ONCE + 1)
        like_it = reach[~run.differs(run.recorded[done], run.meant(reach)).any(axis=1)]
        if not len(like_it):
            if everywhere is None:
                everywhere = np.arange(run.steps[-1] + number + 1)
            like_it = everywhere[~run.differs(run.recorded[done], run.meant(everywhere)).any(axis=1)]
        if not len(like_it):
            return None
        last = int(min(like_it, key=lambda place: (abs(place - last - 1), -place)))
        places[done] = last
        done += 1
    return places


def _uneven_windows(by: np.ndarray) -> str | None:
    inner = by[1:]  # the first may have one more, or one less
    most = int(inner.max(initial=0))
    if (
        len(inner) < _FEWEST_POINTS
        or most < 2
        or most > _MOST_STEPS_AT_ONCE
        or inner.min() < 1
        or np.mean(inner == most) < 0.5
    ):
        return None
    others = ", ".join(str(count) for count in sorted({*inner.tolist()} - {most}))
    return (
        f"the scheduler is stepped {most} times per optimizer step, and {others} in shorter windows, as if once per "
        "micro-batch; step it once per optimizer step"
    )


def _several_since(run: Run, by: np.ndarray) -> str | None:
    since, times = int((by != 1).argmax()), int(by[-1])
    if times < 2 or since == 0 or len(by) - since < _FEWEST_POINTS or np.any(by[since:] != times):
        return None
    return f"from step {run.steps[since]} on the scheduler is stepped {times} times per optimizer step; step it once"


def _piece_by_piece(run: Run, places: np.ndarray, by: np.ndarray) -> str | None:
    odd = np.flatnonzero(by != 1)
    if len(odd) > min(_MOST_IRREGULAR, max(1, len(by) // 3)):
        return None
    pieces = []
    if odd[0] == 0 and by[0] > 2:  # one step may be an overflow, several are rather a run that goes on
        pieces.append(_late_start(int(run.steps[0]), int(places[0])))
        odd = odd[1:]
    over, waits, back = (odd[part] for part in (by[odd] > 1, by[odd] == 0, by[odd] < 0))
    for index in over:
        before = int(places[index - 1]) + 1 if index else int(run.steps[0])
        if _twice(before, int(places[index])):
            pieces.append(_counted_twice(int(run.steps[index]), int(places[index])))
            over = over[over != index]
    if len(over):
        times = int((by[over] - 1).sum())
        pieces.append(
            f"the scheduler went on {_times(times)} without the optimizer, before {_listed(run.steps[over])} "
            "(overflows that the optimizer skipped?); step it only after an applied optimizer.step()"
        )
    if len(waits):
        pieces.append(
            f"the scheduler was not stepped before {_listed(run.steps[waits])}; call scheduler.step() after every "
            "optimizer.step()"
        )
    for index in back:
        anew = "starts anew" if places[index] == 0 else f"goes back to step {places[index]}"
        pieces.append(
            f"from step {run.steps[index]} on it {anew}; load the scheduler's state_dict on resume, or pass last_epoch"
        )
    return "; and ".join(pieces)


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _listed(steps: np.ndarray) -> str:
    *init, last = [str(step) for step in steps.tolist()]
    return f"steps {', '.join(init)} and {last}" if init else f"step {last}"
