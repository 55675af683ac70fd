"""Weights and moments as `precision` declares them: read at least in float32, and written back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt.backends.eager.rounding import is_finite, random_keys, random_words, rounded
from fusedopt.backends.scratch import scratch
from fusedopt.interface import ShardInfo
from fusedopt.precision import NUMBER, master_state

if TYPE_CHECKING:
    from fusedopt.backends.eager.stepper import Bucket


def read_weight(p: Tensor, master: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The weight of a parameter, at least in float32; `p` itself if it is one.

    What completes a parameter counts only as far as it still fits: others may have written to the parameter.

    Args:
        p: the parameter.
        master: what completes it, laid out alike: an int16 remainder, a float32 copy, or None.
        out: memory for the weight of a 16-bit parameter.
    """
    weight = join_weight(p, master, out)
    # Zeros and infinities have remainders of one sign only: with one that is left over they would become NaN.
    if weight is not p and master is not None and not is_finite(weight):
        weight.copy_(torch.where(weight.isnan(), p, weight))
    return weight


def join_weight(p: Tensor, master: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The same, where a remainder that others left over may make a NaN of a zero or an infinity."""
    if p.dtype.itemsize > 2:
        return p
    weight = p.to(torch.float32) if out is None else out.copy_(p)
    if master is None:
        return weight
    if master.dtype == torch.float32:
        return torch.where(master.to(p.dtype) == p, master, weight, out=weight)
    weight.view(torch.int32).add_(as_cached(master, torch.int32))
    return weight


def write_weight(p: Tensor, master: Tensor | None, weight: Tensor, bits: Tensor | None) -> None:
    """Writes a weight, whose memory may be used up, into a parameter and what completes it; see `weight_writer`."""
    weight_writer(p, master, weight, bits)()


def weight_writer(
    p: Tensor, master: Tensor | None, weight: Tensor, bits: Tensor | None, finite: bool | None = None
) -> Callable[[], object]:
    """Returns what writes a weight, whose memory may be used up, into a parameter and what completes it.

    To write takes no more memory.

    Args:
        p: the parameter.
        master: as in `read_weight`.
        weight: of the shape of `p`, in the dtype that `read_weight` returned.
        bits: for stochastic rounding, see `round_into`; None to round to nearest.
        finite: what `is_finite` says of the weight, if that is known.
    """
    if master is None:
        if weight.data_ptr() == p.data_ptr() and weight.dtype == p.dtype:
            return lambda: None
        return partial(p.copy_, rounded(weight, p.dtype, bits))
    if master.dtype == torch.float32:
        return partial(_write_copy, p, master, weight)
    if is_finite(weight) if finite is None else finite:
        return partial(_write_halves, p, master, weight)
    # A NaN may have its bits in the lower half alone.
    words = torch.nan_to_num(weight, torch.nan, torch.inf, -torch.inf).view(torch.int32)
    return partial(_write_rounded_halves, p, master, words)


def _write_copy(p: Tensor, master: Tensor, weight: Tensor) -> None:
    master.copy_(weight)
    p.copy_(weight)


def _write_halves(p: Tensor, master: Tensor, weight: Tensor) -> None:
    words = weight.view(torch.int32)
    master.copy_(words)  # the lower half
    # Now no weight is on a tie, where bfloat16 would go to the even neighbour, and the remainder always up.
    words.bitwise_or_(1)
    p.copy_(weight)


def _write_rounded_halves(p: Tensor, master: Tensor, words: Tensor) -> None:
    master.copy_(words)
    p.view(torch.int16).copy_(words.add_(0x8000).bitwise_right_shift_(16))


def as_cached(t: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """`t` in another dtype, times a factor; on a CPU in memory that stays in the cache and that the next one gets."""
    if t.dtype != dtype:
        on_cpu = t.device.type == "cpu" and t.is_contiguous()
        t = scratch.like(t, "wide", dtype).copy_(t) if on_cpu else t.to(dtype)
        return t if factor == 1.0 else t.mul_(factor)
    return t if factor == 1.0 else t * factor


def remainder_beside(p: Tensor, weight: Tensor) -> Tensor:
    """The remainder that completes a bfloat16 parameter to a float32 weight; 0 where it rounds to another parameter."""
    difference = weight.view(torch.int32) - (p.view(torch.int16).to(torch.int32) << 16)
    fits = (difference >= -0x8000) & (difference <= 0x8000)  # a tie may have been rounded down
    return torch.where(fits, difference.clamp(max=0x7FFF), 0).to(torch.int16)


class Storage(NamedTuple):
    """How the parameters of a bucket are kept: lists of one entry per parameter.

    Attributes:
        masters: what completes each; None for nothing.
        stochastic: True if 16-bit weights are rounded stochastically.
        keys: uint32 [parameters, 2], of their random words; None if nothing is random.
        shard_infos: None if all are whole.
    """

    masters: list[Tensor | None]
    stochastic: bool
    keys: np.ndarray | None
    shard_infos: Sequence[ShardInfo | None] | None

    @classmethod
    def of(cls, bucket: "Bucket", which: Sequence[int] | None = None) -> "Storage":
        """The storage of the parameters of a bucket, or of some of them."""
        which = range(len(bucket.params)) if which is None else which
        states = [bucket.states[i] for i in which]
        masters: list[Tensor | None] = [None] * len(states)
        if bucket.precision.master_weights:
            masters = [master_of(bucket.params[i], state) for i, state in zip(which, states)]
        numbers = [] if bucket.precision.is_plain else [s.get(NUMBER) for s in states]
        keys = None
        if any(number is not None for number in numbers):
            none = torch.tensor(0, dtype=torch.int64, device="cpu")
            known = torch.stack([none if number is None else number.cpu() for number in numbers])
            keys = random_keys(bucket.precision.seed, known.tolist(), bucket.step)
        infos = bucket.shard_infos and [bucket.shard_infos[i] for i in which]
        return cls(masters, bucket.precision.stochastic_rounding, keys, infos)

    def words(self, which: Sequence[int], sizes: Sequence[int], start: int, device: torch.device) -> Tensor:
        """The random words of consecutive elements of some parameters; see `random_words`."""
        assert self.keys is not None
        infos = [None] * len(which) if self.shard_infos is None else [self.shard_infos[i] for i in which]
        positions = [None if info is None else info.position for info in infos]
        return random_words(self.keys[which], sizes, start, positions, device)


def master_of(p: Tensor, state: dict[str, Tensor]) -> Tensor | None:
    """What completes a parameter, with master weights; None for nothing."""
    name = master_state(p.dtype)
    return None if name is None else state[name]


def weight_bits(words: Tensor) -> Tensor:
    """The random bits that round a weight."""
    return words & 0xFFFF


def moment_bits(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The random bits that round a moment to this dtype: the first ones, as many as do not fit."""
    return (words >> 19) & 0x1FFF if dtype == torch.float16 else (words >> 16) & 0xFFFF
