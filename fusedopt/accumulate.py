"""GradientAccumulator: sums of gradients over micro-batches, and the mean that belongs to them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt import backends
from fusedopt_kernels.memory import outside_inference_mode

_BUCKET_BYTES = 1 << 25
"""Bytes that one all-reduce carries, as in DistributedDataParallel; roughly the extra memory that it takes."""


@dataclass
class _Position:
    """One place in the list of gradients."""

    open: bool
    """True if it may ever hold a sum."""
    memory: Tensor | None = None
    """Memory of the sum; its contents count only if `filled`."""
    filled: bool = False
    """True if a gradient was added since the last reset."""
    lent: bool = False
    """True if the memory was handed out: it is then replaced, not written to."""
    zero: int | None = None
    """Of memory that was handed out as zeros: how often it had been written to, which it is not since then."""

    def writable(self, like: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The memory that the next sum goes to."""
        with outside_inference_mode():
            if self.memory is None:
                self.memory = torch.empty_like(like, dtype=dtype)
            elif self.lent:
                self.memory = torch.empty_like(self.memory)
        self.filled, self.lent, self.zero = True, False, None
        return self.memory

    def zeros(self) -> Tensor:
        """Zeros in the place of a sum, the same tensor while it is zero: a step that is tried again knows it."""
        assert self.memory is not None
        if self.zero is None or self.zero != self.memory._version:
            with outside_inference_mode():
                self.memory = torch.zeros_like(self.memory)
            self.lent, self.zero = True, self.memory._version
        return self.memory


class GradientAccumulator:
    """Sums gradients over micro-batches, like the class of transformers' TensorFlow half, for torch.

    Called with a list of gradients, it adds each to the sum at its position. The first list fixes the number of
    positions and which of them are None; those stay None for good. For torch's habits there is `accumulate`, which
    takes the gradients out of `.grad`. Then an optimizer updates from the sums, not copied or scaled in memory:

        optimizer.apply_gradients(zip(accumulator.gradients, params), scale=accumulator.scale)
        accumulator.reset()

    `scale` is one over the sum of the weights, by default one over the number of calls that there really were: right
    for a last window with fewer micro-batches too. Where micro-batches hold different numbers of tokens and each loss
    is the mean over its own, pass those numbers as weights: then the mean is the one over all tokens.

    On a GPU one launch adds all tensors. Under DistributedDataParallel run `backward()` inside `model.no_sync()`: the
    sums stay those of this process until `all_reduce()`.

    Args:
        dtype: of the sums; None for that of the first gradients. float32 keeps what bfloat16 sums would lose.
        backend: "auto" (Triton for CUDA and ROCm tensors, eager for the others), "triton" or "eager".

    Raises:
        ValueError: `dtype` is no floating dtype.

    Source: transformers 4.34, `optimization_tf.py`.

    Example:
        >>> import fusedopt, torch
        >>> from fusedopt.accumulate import GradientAccumulator
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer, accumulator = fusedopt.AdamW(model.parameters(), lr=0.1), GradientAccumulator()
        >>> for tokens in ([1.0, 3.0, 5.0], [7.0]):
        ...     model(torch.tensor(tokens)[:, None]).mean().backward()
        ...     accumulator.accumulate(model.parameters(), weight=len(tokens))
        >>> (accumulator.gradients[0] * accumulator.scale).item()  # the mean of all four, not of the two means
        4.0
        >>> optimizer.apply_gradients(zip(accumulator.gradients, model.parameters()), scale=accumulator.scale)
        >>> accumulator.reset()
    """

    def __init__(self, dtype: torch.dtype | None = None, *, backend: str = "auto") -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
        backends.check(backend)
        self.dtype = dtype
        self.backend = backend
        self._adders: dict[torch.device, Any] = {}
        self._positions: list[_Position] = []
        self._params: list[Tensor] | None = None  # set by `accumulate`
        self.reset()

    def reset(self) -> None:
        """Starts a new window: nothing is summed, `step` is 0. The positions stay."""
        self._step = 0
        self._weight: float | Tensor = 0.0
        self._reduced = False
        for position in self._positions:
            position.filled = False

    @property
    def step(self) -> int:
        """Number of calls since the last `reset`."""
        return self._step

    @property
    def weight(self) -> float | Tensor:
        """Sum of the weights since the last `reset`; a 0-d float32 tensor if one of them was a tensor on a GPU."""
        return self._weight

    @property
    def scale(self) -> float | Tensor:
        """The factor that makes the weighted mean of the sums: one over `weight`. As a tensor, 0 where `weight` is 0.

        Raises:
            ValueError: there is nothing to average: the weights are 0, or there was no call.
        """
        if isinstance(self._weight, Tensor):
            return torch.where(self._weight == 0.0, 0.0, 1.0 / self._weight)
        if self._weight == 0.0:
            raise ValueError(f"the weights of {self._step} calls add up to 0, so there is no mean: skip this update")
        return 1.0 / self._weight

    @property
    def gradients(self) -> list[Tensor | None]:
        """The sums, one per position. They are not copies, but never written to again; do not write to them either.

        Where there was no gradient since the last `reset`: zeros if they come by calls, None if by `accumulate`.

        Raises:
            ValueError: there was no call yet.
        """
        if not self._positions:
            raise ValueError("there are no gradients yet: call the accumulator, or accumulate(parameters), first")
        return [self._show(position) for position in self._positions]

    def _show(self, position: _Position) -> Tensor | None:
        if position.memory is None:
            return None
        if not position.filled:
            return position.zeros() if self._params is None else None
        position.lent = True
        return position.memory

    def __call__(self, gradients: Iterable[Tensor | None], weight: float | Tensor = 1.0) -> None:
        """Adds the gradients of one micro-batch.

        Args:
            gradients: as many as in the first call, each None (which adds nothing) or of the shape and on the device of
                the first at its position. They are not kept.
            weight: factor on them, and their share in the mean, >= 0; a number, or a tensor of one element, which on a
                GPU is not waited for. At 0 nothing is added, whatever they hold: a mean over no tokens is NaN.

        Raises:
            ValueError: a wrong number of gradients, one that does not fit its sum, or a weight that is negative or not
                finite; nothing was changed.
        """
        gradients = list(gradients)
        if self._params is not None:
            raise ValueError("this accumulator takes the gradients of parameters: go on with accumulate(parameters)")
        positions = self._positions or [_Position(open=g is not None) for g in gradients]
        _check_length("gradients", len(gradients), len(positions))
        self._add(positions, [g if position.open else None for g, position in zip(gradients, positions)], weight)

    def accumulate(self, parameters: Iterable[Tensor], weight: float | Tensor = 1.0) -> None:
        """Adds the gradients in `.grad` and sets `.grad` to None.

        A parameter without gradient adds nothing and, unlike a None in a call, may have one later.

        Args:
            parameters: the same ones, in the same order, every time.
            weight: as in a call.

        Raises:
            ValueError: as in a call, and if these are not the parameters of before; nothing was changed.
        """
        params = list(parameters)
        if self._params is None and self._positions:
            raise ValueError("this accumulator takes lists of gradients: go on calling it with them")
        known = params if self._params is None else self._params
        _check_length("parameters", len(params), len(known))
        if any(p is not q for p, q in zip(params, known)):
            raise ValueError("the parameters are not those of before, in their order: use an accumulator for each list")
        positions = self._positions or [_Position(open=True) for _ in params]
        self._add(positions, [p.grad for p in params], weight)
        self._params = params
        for p in params:
            p.grad = None

    @torch.no_grad()
    def _add(self, positions: list[_Position], grads: Sequence[Tensor | None], weight: float | Tensor) -> None:
        if self._reduced:
            raise ValueError("the sums are already those of all processes: call reset() before adding to them")
        weight = _checked_weight(weight)
        work: dict[torch.device, list[tuple[_Position, Tensor]]] = {}
        for number, (position, g) in enumerate(zip(positions, grads)):
            if g is not None:
                _check_gradient(number, g, position.memory)
                work.setdefault(g.device, []).append((position, g.resolve_neg()))
        for device, entries in work.items():
            adder = self._adder(device)
            previous = [position.memory if position.filled else None for position, _ in entries]
            sums = [position.writable(g, self.dtype) for position, g in entries]
            adder(sums, [g for _, g in entries], previous, weight)
        self._positions = positions
        self._step += 1
        self._weight = self._weight + weight

    def _adder(self, device: torch.device) -> Any:
        if device not in self._adders:
            chosen = backends.choose(device, self.backend)
            self._adders[device] = import_module(f"fusedopt.backends.{chosen}.accumulation").Adder(device)
        return self._adders[device]

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Makes sums, `step` and `weight` those of all processes together; each calls it once per window.

        Afterwards `scale` gives the mean over the micro-batches (by weight) of all processes, however many each had. A
        position that got a gradient in some processes only counts as zeros in the others. Waits for the device.

        Args:
            group: of processes; None for all of them.

        Raises:
            ValueError: in all processes: called twice in a window; a process was never called, or with another number
                of gradients; or a position is None for good in some and not in others.
        """
        mine = [(position.open, position.filled) for position in self._positions]
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (self._reduced, self._step, float(self._weight), mine), group=group)
        reduced, steps, weights, states = zip(*everyone)
        if any(reduced):
            raise ValueError("the sums are already those of all processes: call reset() before the next window")
        lengths = [len(state) for state in states]
        if min(lengths) != max(lengths) or not mine:
            raise ValueError(f"the processes have {lengths} gradients: each must have been called with as many by now")
        for number, (position, column) in enumerate(zip(self._positions, zip(*states))):
            if any(filled for _, filled in column):
                if not all(is_open for is_open, _ in column):
                    raise ValueError(
                        f"gradient {number} was None in the first call of some processes and not of others: "
                        "use accumulate(parameters), which lets gradients come later"
                    )
                if not position.filled:
                    like = self._params[number] if self._params is not None else position.memory
                    position.writable(like, self.dtype).zero_()  # type: ignore[arg-type]
        for bucket in self._buckets():
            flat = torch.cat([s.reshape(-1) for _, s in bucket])
            dist.all_reduce(flat, group=group)
            for (position, s), total in zip(bucket, flat.split([s.numel() for _, s in bucket])):
                position.writable(s, self.dtype).copy_(total.view(s.shape))
        self._step, self._weight, self._reduced = sum(steps), sum(weights), True

    def _buckets(self) -> Iterator[list[tuple[_Position, Tensor]]]:
        """Filled positions and their sums, in runs of one device, one dtype and not much more than `_BUCKET_BYTES`."""
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[_Position, Tensor]]] = {}
        for position in self._positions:
            if position.memory is not None and position.filled:
                s = position.memory
                kind = kinds.setdefault((s.device, s.dtype), [])
                kind.append((position, s))
                if sum(s.nbytes for _, s in kind) >= _BUCKET_BYTES:
                    yield kinds.pop((s.device, s.dtype))
        yield from kinds.values()


def _check_length(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"expected {expected} {what}, as in the first call, got {got}")


def _checked_weight(weight: float | Tensor) -> float | Tensor:
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise ValueError(
                f"weight as a tensor must hold one real number, got shape {tuple(weight.shape)}, {weight.dtype}"
            )
        if weight.device.type != "cpu":
            return weight.detach().reshape(()).to(torch.float32)
        weight = weight.item()
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ValueError(f"weight must be finite and >= 0, got {weight!r}")
    return float(weight)


def _check_gradient(number: int, g: Tensor, s: Tensor | None) -> None:
    if g.layout is not torch.strided or not g.dtype.is_floating_point:
        raise ValueError(f"gradient {number} is {g.layout}, {g.dtype}: gradients must be dense and of a floating dtype")
    if s is not None and (g.shape != s.shape or g.device != s.device):
        raise ValueError(
            f"gradient {number} of shape {tuple(g.shape)} on {g.device} does not fit its sum of shape "
            f"{tuple(s.shape)} on {s.device}"
        )
