"""The settings of the demo, each declared once: the options of the command line and the checks follow."""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

import fusedopt
from fusedopt.demo.text import LARGEST_TEXT
from fusedopt.reference import ReferenceAdafactor, ReferenceAdamW, ReferenceAdamWeightDecay
from fusedopt.schedules import SchedulerType

CONTEXT = 64
"""Bytes in a window; short, so that two trainings take less than a minute on two CPU cores."""

METRICS, PICTURE, CHECKPOINT = "metrics.jsonl", "demo.png", "checkpoint.pt"
"""Files that a run leaves in its folder."""

SCHEDULES = tuple(member.value for member in SchedulerType)
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Choice(NamedTuple):
    """An optimizer of the demo: its class here, its reference, and the arguments of both."""

    ours: Callable[..., Optimizer]
    reference: Callable[..., Optimizer]
    lr: float | None
    """Default learning rate; None: the optimizer has a rate of its own, and no schedule."""
    options: dict[str, Any]
    lr_name: str = "lr"


OPTIMIZERS = {
    "adamw": Choice(fusedopt.AdamW, ReferenceAdamW, 2e-3, {"betas": (0.9, 0.99), "weight_decay": 0.1}),
    # The settings that T5 was fine-tuned with, then the original's defaults: rates relative to the parameters' size.
    "adafactor": Choice(
        fusedopt.Adafactor, ReferenceAdafactor, 1e-3, {"scale_parameter": False, "relative_step": False}
    ),
    "adafactor_relative": Choice(fusedopt.Adafactor, ReferenceAdafactor, None, {}),
    "adam_weight_decay": Choice(
        fusedopt.AdamWeightDecay,
        ReferenceAdamWeightDecay,
        2e-3,
        {"beta_2": 0.99, "weight_decay_rate": 0.1},
        lr_name="learning_rate",
    ),
}


def schedule(name: str) -> str:
    """Returns the name of a schedule; argparse makes an error of its own out of the exception."""
    try:
        return str(SchedulerType(name).value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def setting(
    default: Any,
    text: str,
    *,
    shown: str | None = None,
    limits: tuple[int, int] | None = None,
    words: Iterable[str] = (),
    free: bool = False,
    **option: Any,
) -> Any:
    """Returns a field of `Settings`.

    Args:
        default: the value if none is given.
        text: the help of the command line.
        shown: the default as the help shows it.
        limits: the least and the largest whole number.
        words: the values that it may have.
        free: True if it may change when a run is continued.
        **option: arguments for argparse.
    """
    words = tuple(words)
    if not option and (limits or words):
        option = {"type": int, "metavar": "N"} if limits else {"choices": words}
    option["help"] = f"{text} (default: {default if shown is None else shown})"
    return field(default=default, metadata={"limits": limits, "words": words, "free": free, "option": option})


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the text of a field is its help on the command line.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> Settings(steps=0)
        Traceback (most recent call last):
        ...
        ValueError: steps must be between 1 and 100,000,000, got 0
    """

    steps: int = setting(500, "optimizer steps", limits=(1, 100_000_000), free=True)
    batch_size: int = setting(16, f"windows of {CONTEXT} bytes per batch", limits=(1, 1_000_000))
    accumulate: int = setting(1, "batches per optimizer step", limits=(1, 1_000_000))
    layers: int = setting(4, "blocks of the model", limits=(1, 1_000))
    width: int = setting(128, "features per position of the model", limits=(1, 100_000))
    optimizer: str = setting("adamw", "the optimizer", words=OPTIMIZERS)
    schedule: str | None = setting(
        None, "how the learning rate changes", shown="cosine", words=SCHEDULES, type=schedule, metavar="NAME"
    )
    lr: float | None = setting(
        None,
        "learning rate that the schedule scales",
        shown=", ".join(f"{name} {choice.lr:g}" for name, choice in OPTIMIZERS.items() if choice.lr is not None),
        type=float,
        metavar="RATE",
    )
    dtype: str = setting("float32", "of weights, activations and gradients", words=DTYPES)
    device: str = setting("auto", "auto takes the GPU if there is one", words=("auto", "cpu", "cuda"))
    seed: int = setting(0, "of starting weights and batches", limits=(0, 2**63 - 1))
    text: str | None = setting(
        None,
        f"file to learn from, {LARGEST_TEXT // 10**6} MB of it at most",
        shown="the sources of Python's standard library",
        metavar="PATH",
        free=True,
    )
    out: str = setting("runs/demo", f"folder for {METRICS}, {PICTURE} and {CHECKPOINT}", metavar="DIR", free=True)
    checkpoint_every: int = setting(
        100, "steps between checkpoints; 0: only at the end", limits=(0, 100_000_000), free=True
    )

    def __post_init__(self) -> None:
        for name, value, allowed in ((f.name, getattr(self, f.name), f.metadata) for f in fields(self)):
            if allowed["limits"] and not allowed["limits"][0] <= value <= allowed["limits"][1]:
                least, most = allowed["limits"]
                raise ValueError(f"{name} must be between {least:,} and {most:,}, got {value:,}")
            if allowed["words"] and value not in allowed["words"] and (name, value) != ("schedule", None):
                raise ValueError(f"{name} must be one of {', '.join(allowed['words'])}, got {value!r}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"lr must be a finite number >= 0, got {self.lr}")
        if OPTIMIZERS[self.optimizer].lr is None and (self.lr, self.schedule) != (None, None):
            raise ValueError(f"optimizer {self.optimizer} has a learning rate of its own; give neither lr nor schedule")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch finds no CUDA or ROCm GPU here; use device 'cpu'")

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def learning_rate(self) -> float | None:
        return OPTIMIZERS[self.optimizer].lr if self.lr is None else self.lr

    @property
    def schedule_name(self) -> str | None:
        return self.schedule or (None if self.learning_rate is None else "cosine")

    def identity(self) -> dict[str, Any]:
        """Returns what must stay the same when a run is continued; the text is compared by its hash."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["free"]}
        return kept | {"lr": self.learning_rate, "schedule": self.schedule_name, "device": self.torch_device.type}
