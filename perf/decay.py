"""`python -m perf.decay`: which optimizers lose a small weight decay in bfloat16, and what they keep per parameter.

1,000 steps with zero gradients, a learning rate of 1e-3 and a weight decay of 0.1 leave 0.9048 of every weight. Each
step takes off a ten-thousandth. A change by less than 1/512 of a bfloat16 weight is lost when it is rounded to nearest.
"""

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perf import report, results, traffic
from perf.providers import LR, Provider
from perf.results import Record, Run

STEPS, WEIGHT_DECAY = 1000, 0.1
RIGHT = (1.0 - LR * WEIGHT_DECAY) ** STEPS
"""The share of its size that a weight has left."""

SHAPE = (256, 256)


class Row(NamedTuple):
    """One optimizer in one configuration."""

    optimizer: str  # as the table calls it
    provider: Provider
    dtype: torch.dtype = torch.bfloat16  # of weights and gradients


_DECAY = {"lr": LR, "weight_decay": WEIGHT_DECAY}
_MOMENTUM = {**_DECAY, "relative_step": False, "scale_parameter": False, "beta1": 0.9}

OURS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "AdamW": ("AdamW", _DECAY),
    "AdamWeightDecay": ("AdamWeightDecay", {"learning_rate": LR, "weight_decay_rate": WEIGHT_DECAY}),
    "Adafactor, beta1=0.9": ("Adafactor", _MOMENTUM),
    "Lion": ("Lion", _DECAY),
}
"""Class and options of our optimizers."""

POLICIES: Mapping[str, Mapping[str, Any]] = {
    "rounded to nearest": {},
    "stochastic_rounding": {"stochastic_rounding": True},
    "master_weights": {"master_weights": True},
    "master_weights, state_dtype=bfloat16": {"master_weights": True, "state_dtype": torch.bfloat16},
}
"""What is done about the weights: options of all our optimizers."""


def _other(optimizer: str, name: str, path: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Row:
    return Row(optimizer, Provider(name, optimizer, path, {**_DECAY, **options}), dtype)


OTHERS = (
    _other("AdamW", "torch, fused, float32 weights", "torch.optim.AdamW", torch.float32, fused=True),
    _other("AdamW", "torch, fused", "torch.optim.AdamW", fused=True),
    _other("AdamW", "bitsandbytes", "bitsandbytes.optim.AdamW"),
    _other("AdamW", "bitsandbytes, 8-bit states", "bitsandbytes.optim.AdamW8bit"),
    _other("AdamW", "optimi, Kahan summation", "optimi.AdamW", kahan_sum=True),
    _other("AdamW", "torchao, stochastic rounding", "torchao.optim._AdamW", bf16_stochastic_round=True),
    _other("AdamW", "torchao, stochastic, 8-bit states", "torchao.optim.AdamW8bit", bf16_stochastic_round=True),
    _other("AdamW", "flashoptim, 24-bit weights, 8-bit states", "flashoptim.FlashAdamW"),
    _other("AdamW", "flashoptim, 32-bit weights", "flashoptim.FlashAdamW", master_weight_bits=32, quantize=False),
    _other("Adafactor", "torch", "torch.optim.Adafactor"),
    _other("Lion", "bitsandbytes", "bitsandbytes.optim.Lion"),
    _other("Lion", "optimi, Kahan summation", "optimi.Lion", kahan_sum=True),
    _other("Lion", "flashoptim, 24-bit weights, 8-bit states", "flashoptim.FlashLion"),
)


def _rows() -> Iterator[Row]:
    """Ours, then those of other packages, optimizer by optimizer."""
    for name, (cls, options) in OURS.items():
        for policy, how in POLICIES.items():
            yield Row(name, Provider(f"fusedopt, {policy}", name, f"fusedopt.{cls}", {**options, **how}, ours=True))
        yield from (row for row in OTHERS if row.optimizer == cls)


ROWS = tuple(_rows())


def run(row: Row, device: torch.device) -> Record:
    """Returns the record of one row: what is left of the weights, and bytes per parameter; or why there is none."""
    record: Record = {"kind": "decay", "optimizer": row.optimizer, "provider": row.provider.name, "right": RIGHT}
    if reason := row.provider.missing(device):
        return {**record, "status": f"missing: {reason}"}
    torch.manual_seed(0)  # of weights, and of those who draw their random bits from torch
    p = torch.nn.Parameter(torch.randn(SHAPE).to(device, row.dtype))
    p.grad = torch.zeros_like(p)
    before = p.detach().double().abs().mean()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it loses updates is what is to be seen
            optimizer = row.provider.make([p])
            for _ in range(STEPS):
                optimizer.step()
    except Exception as error:  # of another package, on this machine: the reason is the result
        return {**record, "status": f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"}
    left = float(p.detach().double().abs().mean() / before)
    sizes = {"weight": p.nbytes, "gradient": p.grad.nbytes, "state": sum(map(_bytes, optimizer.state[p].values()))}
    kept = {name: size / p.numel() for name, size in sizes.items()}
    return {**record, "status": "measured", "left": left, "bytes": kept, "total": sum(kept.values())}


def _bytes(value: Any) -> int:
    """Returns the bytes of a tensor of a state; of one made of others, such as codes and scales, of all of these."""
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(_bytes(getattr(value, name)) for name in names)
    return value.nbytes


def moved(row: Row) -> float:
    """Returns the bytes per parameter that a step of ours moves, counted load by load; needs TRITON_INTERPRET=1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return traffic.trace(lambda params: row.provider.make(params, backend="triton"), [SHAPE], row.dtype).moved


def rows(device: torch.device) -> Iterator[Record]:
    """Runs all rows, and counts what a step of ours moves."""
    with traffic.interpreted(moved, [row for row in ROWS if row.provider.ours]) as counts:
        for row in ROWS:
            record = run(row, device)
            yield {**record, "moved": next(counts)} if row.provider.ours else record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.decay", description=__doc__.partition("\n")[0])
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=where, help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="write the results to this file, as JSON lines")
    parser.add_argument("--into", type=Path, nargs="*", default=[], help="Markdown files with marks for the table")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    records = [results.environment(device), *rows(device)]
    if options.out:
        options.out.unlink(missing_ok=True)
        results.append(options.out, records)
    report.publish(Run(records), options.into)


if __name__ == "__main__":
    main()
