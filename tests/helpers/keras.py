"""The recorded runs of the TensorFlow half as cases of `golden`, and helpers for its tests."""

import json
from typing import Any

import pytest
import torch

from fusedopt import backends
from fusedopt.keras import AdamWeightDecay
from fusedopt.keras.schedules import revive
from helpers.comparing import Tolerance
from helpers.golden import _SAME_FORMULA_32, GOLDEN, Case, Parameter, _arrays, _index, _state

TOLERANCES = {
    torch.float32: _SAME_FORMULA_32,
    torch.float64: Tolerance(
        "the original rounds rates and betas to float32, here they are exact", rtol=1e-5, atol=1e-7
    ),
}

# The state's, for float64: betas that were rounded to float32, relative to 1 - beta.
STATE_64 = Tolerance("the original rounds betas to float32, here they are exact", of_largest=5e-5)

STATES = {"m": "exp_avg", "v": "exp_avg_sq", "vhat": "max_exp_avg_sq"}


def _runs(backend: str) -> bool:
    return backend == "eager" or (backends.has_triton() and (torch.cuda.is_available() or backends.interpreting()))


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not _runs(name), reason=f"{name} cannot run here"))
    for name in ("eager", "triton")
]


def device_of(backend: str) -> str:
    """Returns the device of the parameters in a test of this backend."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() and not backends.interpreting() else "cpu"


def schedule(description: Any) -> Any:
    """Returns a recorded learning rate: a number, one of our schedules, or a plain function of the step."""
    if not isinstance(description, dict):
        return description
    config = description["config"]
    if description["class_name"] == "constant":
        return lambda step: config["value"]
    if description["class_name"] == "affine":
        return lambda step: config["a"] * step + config["b"]
    return revive({**description, "config": {name: schedule(value) for name, value in config.items()}})


class KerasCase(Case):
    """A recorded run of a TensorFlow optimizer; all parameters are in one group."""

    @property
    def names(self) -> list[str]:
        """As the original's regular expressions see them, ":0" at the end."""
        return [entry["var_name"] for entry in self.raw["params"]]

    @property
    def rates(self) -> list[float]:
        """The rate that each step used."""
        return self.raw["lr_per_step"]

    @property
    def parameters(self) -> list[Parameter]:
        arrays = _arrays(self.family)
        found = []
        for entry in self.raw["params"]:
            init, grads, expected = (
                torch.from_numpy(arrays[entry[key]]).to(self.dtype) for key in ("init", "grads", "expected")
            )
            if "sparse_indices" in self.raw:
                grads = torch.stack(
                    [
                        torch.zeros_like(init).index_add(0, torch.tensor(rows, device="cpu"), g[: len(rows)])
                        for g, rows in zip(grads, self.raw["sparse_indices"])
                    ]
                )
            tensors = {
                STATES[slot]: {"type": "tensor", "array": key, "dtype": self.raw["dtype"], "shape": entry["shape"]}
                for slot, key in entry["state"].items()
            }
            present = tuple(entry["grad_present"] or [True] * self.steps)
            found.append(Parameter(init, grads[: self.steps], present, expected, _state(tensors, arrays)))
        return found

    def optimizer(self, groups: list[dict[str, Any]], **kwargs: Any) -> AdamWeightDecay:
        return AdamWeightDecay(list(zip(self.names, groups[0]["params"])), **kwargs)


def keras_cases(family: str) -> list[KerasCase]:
    """All cases of "tf_adam_weight_decay" or "tf_create_optimizer", those without a trajectory included."""
    return [
        KerasCase(
            family=family,
            name=entry["name"],
            kwargs={key: schedule(value) for key, value in entry["kwargs"].items()},
            groups=[{"params": list(range(len(entry.get("params", []))))}],
            dtype=getattr(torch, entry.get("dtype", "float32")),
            steps=entry.get("steps", 0),
            record_steps=tuple(entry.get("record_steps", ())),
            lr_per_step=None,
            finite=True,
            sensitive=False,
            raw=entry,
        )
        for entry in _index()[family]["cases"]
    ]


def recorded(family: str) -> Any:
    """A family that is one JSON file."""
    return json.loads((GOLDEN / f"{family}.json").read_text())


def parameter(*values, dtype=torch.float32, device="cpu"):
    return torch.nn.Parameter(torch.tensor(values or (1.0, -2.0), dtype=dtype, device=device))


def step(optimizer, *grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.apply_gradients([(torch.full_like(p, g), p) for p, g in zip(params, grads or [1.0] * len(params))])
