"""Finds the classic mistake that explains the learning rates of a run.

Each explanation is a guess at the step of the schedule from which every optimizer step took its rate, and holds only if
it fits all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Bounds of the guesses: scheduler steps per optimizer step, and steps that a schedule may have jumped to.
_MOST_STEPS_AT_ONCE = 16
_MOST_JUMPS = 32
# Fewer steps fit almost any guess.
_FEWEST_STEPS = 3
# Up to this many irregularities are listed; more of them, or one in every third step, are no explanation.
_MOST_IRREGULAR = 32


@dataclass(frozen=True, eq=False)
class Run:
    """The rates that a run used, and those that were meant.

    Attributes:
        steps: Numbers of the optimizer steps, int64 of shape [n], one apart.
        recorded: Rates that were used, float64 of shape [n, param groups]; NaN where there was none.
        meant: From numbers of steps, shape [k], to the rates meant at them, shape [k, param groups].
        relative: Largest relative difference that counts as equal.
        initial: Rate of each param group that the factors of the schedule multiply.
    """

    steps: np.ndarray
    recorded: np.ndarray
    meant: Callable[[np.ndarray], np.ndarray]
    relative: float
    initial: np.ndarray

    def differs(self, recorded: np.ndarray, expected: np.ndarray) -> np.ndarray:
        # A factor near 0 has the rounding of the numbers around 1 that it was computed from.
        rounding = 1e-12 * np.abs(self.initial)
        differs: np.ndarray = np.abs(recorded - expected) > self.relative * np.abs(expected) + rounding
        return differs

    def fits(self, schedule_steps: np.ndarray, since: int = 0) -> bool:
        """True if the optimizer steps from index `since` on used the rates meant at `schedule_steps`."""
        rows = self.recorded[since:]
        few = slice(0, None, max(1, len(rows) // 64))  # refutes most guesses
        return all(not self.differs(rows[part], self.meant(schedule_steps[part])).any() for part in (few, slice(None)))

    def matches(self, index: int, schedule_steps: np.ndarray) -> np.ndarray:
        """Returns those of `schedule_steps` at which the rate of the optimizer step at `index` is meant."""
        return schedule_steps[~self.differs(self.recorded[index], self.meant(schedule_steps)).any(axis=1)]

    @property
    def reach(self) -> np.ndarray:
        """The steps that the schedule can have jumped to."""
        return np.arange(self.steps[-1] + len(self.steps) + 1)


def explain(run: Run) -> str | None:
    """Returns the mistake that explains the whole run, with the way out; None if none does, or no rate is wrong."""
    wrong = run.differs(run.recorded, run.meant(run.steps)).any(axis=1)
    if len(run.steps) < _FEWEST_STEPS or not wrong.any():
        return None
    first = int(wrong.argmax())
    # In this order: in a linear warm-up, two steps at once are also twice the rate.
    guesses = (_resumed, _never_stepped, _stepped_first, _several_at_once, _once_in_many, _scaled, _jumped, _irregular)
    return next((sentence for guess in guesses if (sentence := guess(run, first))), None)


def _resumed(run: Run, first: int) -> str | None:
    """The rate of the first step is loaded with the optimizer, whatever arguments the schedule has now."""
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
        for ahead in range(times):  # this many of them come before the optimizer step
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
    step, elapsed = run.steps[first], run.steps[first:] - run.steps[first]
    if len(elapsed) < _FEWEST_STEPS:
        return None
    matches = run.matches(first, run.reach)
    nearest = matches[np.argsort(np.abs(matches - step), kind="stable")][:_MOST_JUMPS]
    for target in sorted(nearest, key=lambda target: target != 0):
        if not run.fits(target + elapsed, since=first):
            continue
        if target == 0:
            return f"from step {step} on it starts anew; load the scheduler's state_dict on resume, or pass last_epoch"
        by = "1 step" if abs(target - step) == 1 else f"{abs(target - step)} steps"
        if target > step and first == 0:
            return _late_start(step, target)
        if _twice(step, target):
            return _counted_twice(step, target)
        side = "ahead (stepped although the optimizer was not?)" if target > step else "behind (an older checkpoint?)"
        return f"from step {step} on the scheduler is {by} {side}; step and save both together"
    return None


def _late_start(step: int, target: int) -> str:
    if _twice(step, target):
        return _counted_twice(step, target)
    return (
        f"the record starts with the rate of step {target}, not {step}; pass first_step={target} to LRRecorder if the "
        f"run goes on from there, else step the scheduler only after an applied optimizer.step() (an overflow?)"
    )


def _twice(step: int, target: int) -> bool:
    """True if `target` is twice the step; of the first few steps that says nothing."""
    return step > 4 and abs(target - 2 * step) <= 1


def _counted_twice(step: int, target: int) -> str:
    return (
        f"from step {step} on the scheduler is at step {target}, so the steps before counted twice; on resume load its "
        "state_dict, or pass last_epoch, or step it forward, but only one of them"
    )


def _irregular(run: Run, first: int) -> str | None:
    """A run whose scheduler was mostly right, or always wrong in the same way except at the ends of windows."""
    sources = _source_steps(run)
    if sources is None:
        return None
    strides = np.diff(sources, prepend=run.steps[0] - 1)
    # The last rate, once it stays, does not say from which step it was taken.
    moving = np.flatnonzero(np.any(run.recorded != run.recorded[-1], axis=1))
    known = strides[: moving[-1] + 1] if len(moving) else strides
    return _several_since(run, known) or _uneven_windows(known) or _one_by_one(run, sources, strides)


def _source_steps(run: Run) -> np.ndarray | None:
    """Returns the step of the schedule from which each optimizer step took its rate; None if a rate is out of reach.

    Where several steps have the rate, it is the one nearest to what follows the last.
    """
    number = len(run.steps)
    sources = np.empty(number, dtype=np.int64)
    last, done, ahead = int(run.steps[0]) - 1, 0, 16
    while done < number:
        following = last + 1 + np.arange(min(ahead, number - done))
        wrong = run.differs(run.recorded[done : done + len(following)], run.meant(following)).any(axis=1)
        right = int(wrong.argmax()) if wrong.any() else len(following)
        sources[done : done + right] = following[:right]
        last, done, ahead = last + right, done + right, 2 * ahead
        if right == len(following):
            continue
        ahead = 16
        matches = run.matches(done, np.arange(max(last, 0), last + 1 + _MOST_STEPS_AT_ONCE + 1))
        if not len(matches):
            matches = run.matches(done, run.reach)
        if not len(matches):
            return None
        last = int(min(matches, key=lambda step: (abs(step - last - 1), -step)))
        sources[done] = last
        done += 1
    return sources


def _uneven_windows(strides: np.ndarray) -> str | None:
    inner = strides[1:]  # the first may have one more, or one less
    most = int(inner.max(initial=0))
    if len(inner) < _FEWEST_STEPS or not 2 <= most <= _MOST_STEPS_AT_ONCE:
        return None
    if inner.min() < 1 or np.mean(inner == most) < 0.5:
        return None
    others = ", ".join(str(count) for count in sorted({*inner.tolist()} - {most}))
    return (
        f"the scheduler is stepped {most} times per optimizer step, and {others} in shorter windows, as if once per "
        "micro-batch; step it once per optimizer step"
    )


def _several_since(run: Run, strides: np.ndarray) -> str | None:
    since, times = int((strides != 1).argmax()), int(strides[-1])
    if times < 2 or since == 0 or len(strides) - since < _FEWEST_STEPS or np.any(strides[since:] != times):
        return None
    return f"from step {run.steps[since]} on the scheduler is stepped {times} times per optimizer step; step it once"


def _one_by_one(run: Run, sources: np.ndarray, strides: np.ndarray) -> str | None:
    odd = np.flatnonzero(strides != 1)
    if len(odd) > min(_MOST_IRREGULAR, max(1, len(strides) // 3)):
        return None
    parts = []
    if odd[0] == 0 and strides[0] > 2:  # one step may be an overflow, several mean a run that goes on
        parts.append(_late_start(int(run.steps[0]), int(sources[0])))
        odd = odd[1:]
    over, waits, back = odd[strides[odd] > 1], odd[strides[odd] == 0], odd[strides[odd] < 0]
    for index in over:
        before = int(sources[index - 1]) + 1 if index else int(run.steps[0])
        if _twice(before, int(sources[index])):
            parts.append(_counted_twice(int(run.steps[index]), int(sources[index])))
            over = over[over != index]
    if len(over):
        number = int((strides[over] - 1).sum())
        times = {1: "once", 2: "twice"}.get(number, f"{number} times")
        parts.append(
            f"the scheduler went on {times} without the optimizer, before {_listed(run.steps[over])} "
            "(overflows that the optimizer skipped?); step it only after an applied optimizer.step()"
        )
    if len(waits):
        parts.append(
            f"the scheduler was not stepped before {_listed(run.steps[waits])}; call scheduler.step() after every "
            "optimizer.step()"
        )
    for index in back:
        anew = "starts anew" if sources[index] == 0 else f"goes back to step {sources[index]}"
        parts.append(
            f"from step {run.steps[index]} on it {anew}; load the scheduler's state_dict on resume, or pass last_epoch"
        )
    return "; and ".join(parts)


def _listed(steps: np.ndarray) -> str:
    *init, last = [str(step) for step in steps.tolist()]
    return f"steps {', '.join(init)} and {last}" if init else f"step {last}"
