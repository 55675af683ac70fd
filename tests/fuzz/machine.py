"""Events in random order, each followed by a step, as hypothesis draws and shrinks them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import event, reject
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fuzz import drawn
from fuzz.events import Run
from fuzz.formulas import UnclearError
from fuzz.setups import LAYOUTS, Grads, Setup
from fuzz.watch import Watch

PLACES = st.integers(0, 7)

BAD_OPTIONS = (
    *(("lr", math.nan), ("lr", -1.0), ("lr", torch.ones(2)), ("weight_decay", None), ("weight_decay", -0.1)),
    *(("betas", (0.9, 1.0)), ("betas", 0.9), ("eps", "1e-8"), ("eps", -1.0), ("amsgrad", 1), ("beta1", 1.0)),
    *(("clip_threshold", 0.0), ("decay_rate", 0.1), ("state_dtype", torch.float16), ("master_weights", None)),
    *(("maximize", 0), ("weight_decay", torch.tensor(-1.0)), ("stochastic_rounding", "yes")),
)


def events(name: str, backends: tuple[str, ...]) -> dict[str, dict[str, st.SearchStrategy[Any]]]:
    """The methods of `Run` that may be called between two steps, with what they are given."""
    one_of = st.sampled_from
    wrong_checkpoints = ("groups", "params", "option", "nothing", "shape", "dtype", "sparse", "text", "count")
    schedules = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt")
    return {
        "nothing": {},
        "switch": {"number": PLACES, "options": drawn.group_options(name)},
        "refuse_option": {"number": PLACES, "bad": one_of(BAD_OPTIONS)},
        "add_group": {"group": drawn.groups(name)},
        "refuse_group": {"what": one_of(("twice", "known", "expanded", "option", "whole", "fused"))},
        "drop": {"place": PLACES},
        "move": {"place": PLACES, "number": PLACES},
        "swap": {"place": PLACES, "layout": one_of(tuple(LAYOUTS)), "dtype": one_of((None, *drawn.DTYPES))},
        "cast": {"dtype": one_of(drawn.DTYPES)},
        "write": {"place": PLACES, "seed": PLACES},
        "freeze": {"place": PLACES},
        "resize": {"place": PLACES, "shape": drawn.shapes(False)},
        "zero_grad": {"how": drawn.grads(), "set_to_none": st.booleans()},
        "refuse_gradient": {
            "place": PLACES,
            "what": one_of(("shape", "integers", "sparse", "complex", "twice", "stranger", "scale")),
        },
        "init_state": {},
        "reset_master_weights": {},
        "read_float32": {},
        "load_float32": {"seed": PLACES},
        "checkpoint": {
            "way": one_of(("load", "save", "same", "deepcopy", "pickle")),
            "backend": one_of(backends),
        },
        "refuse_checkpoint": {"place": PLACES, "what": one_of((*wrong_checkpoints, "fraction", "unknown", "missing"))},
        "warm": {"mean": one_of((1.0, 1e-3, 100.0)), "share": one_of((0.0, 0.1, 1.0))},
        "begin_schedule": {
            "name": one_of((*schedules, "constant_with_warmup")),
            "warmup": st.integers(1, 3),
            "total": st.integers(1, 5),
        },
        "advance_schedule": {},
    }


def machine(
    name: str, backends: tuple[str, ...], *, large: bool = False, watch: Watch | None = None
) -> type[RuleBasedStateMachine]:
    """The machine of one optimizer, which begins on the first backend; checkpoints go to any."""
    watch = watch or Watch()

    class Machine(RuleBasedStateMachine):
        run: Run

        @initialize(setup=drawn.setups(name, backends[0], large))
        def begin(self, setup: Setup) -> None:
            watch.begin_example()
            with watched("run = Run", {"setup": setup}):
                self.run = Run(setup)

    @contextmanager
    def watched(call: str, arguments: dict[str, Any]) -> Iterator[None]:
        watch.begin(call, arguments)
        try:
            yield
        except UnclearError:
            reject()
        except Exception as error:
            watch.failed(error)
            raise

    def happening(method: str) -> Callable[..., None]:
        def happens(self: Any, then: Grads, **arguments: Any) -> None:
            event(method)
            with watched(f"run.{method}", arguments):
                getattr(self.run, method)(**arguments)
            with watched("run.step", {"how": then}):
                self.run.step(then)
            watch.steps += 1

        happens.__name__ = method
        return happens

    for method, arguments in events(name, backends).items():
        setattr(Machine, method, rule(**arguments, then=drawn.grads())(happening(method)))
    Machine.__name__ = Machine.__qualname__ = f"{name}On{'And'.join(map(str.capitalize, backends))}"
    return Machine
