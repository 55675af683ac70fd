"""Malformed checkpoints: what a bug, another program or an attacker may make of a state dict. The same for a seed."""

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _OfATensor(Tensor):
    """A subclass of Tensor, as other libraries have them."""


class _Refuses:
    """An object that can be asked for nothing."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    def __bool__(self) -> bool:
        raise RuntimeError("no")

    def __hash__(self) -> int:
        return 0

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no")


def _cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def _deep() -> list[Any]:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    return deep


def _cyclic_dict() -> dict[str, Any]:
    cycle: dict[str, Any] = {}
    cycle["params"] = cycle
    return cycle


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def _nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


VALUES: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (None, True, False, 0, 1, -1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e40)),
    *(lambda value=value: value for value in (math.nan, math.inf, -math.inf, 1j, "", "step", "1", b"1", Ellipsis, int)),
    *(list, dict, tuple, set, object, _Refuses, _cycle, _deep, _cyclic_dict),
    *(lambda value=value: value for value in (Fraction(1, 2), torch.float16, torch.device("meta"), torch.Size([3]))),
    lambda: "x" * 100_000,
    lambda: np.array([0.5, 0.5]),
    lambda: np.array(["a", None], dtype=object),
    lambda: np.float16(3.0),
    lambda: np.datetime64("2020-01-01"),
    lambda: torch.zeros(0),
    lambda: torch.ones(()),
    lambda: torch.tensor(math.nan),
    lambda: torch.tensor(-3.0),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(3),
    lambda: torch.tensor(True),
    lambda: torch.tensor(1 + 2j),
    lambda: torch.ones(2, 3),
    lambda: torch.ones(()).expand(1 << 20, 1 << 20),
    lambda: torch.empty(1 << 30, 1 << 30, device="meta"),
    lambda: torch.ones((), device="meta"),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.eye(3).to_sparse_csr(),
    lambda: torch.tensor(1.0).to_sparse(),
    lambda: torch.ones(3, dtype=torch.float8_e4m3fn),
    lambda: torch.ones(1, dtype=torch.uint8),
    lambda: torch.ones(3).as_subclass(_OfATensor),
    lambda: torch.nn.UninitializedParameter(),
    lambda: torch.ones(1, requires_grad=True),
    _quantized,
    _nested,
    lambda: torch.ones(()).expand(1 << 40),
    lambda: functools.reduce(lambda inner, _: [inner] * 10, range(12), 0.5),
    lambda: [[0.5, [0.5]], 0.5],
    lambda: [0.5] * 3,
    lambda: (0.9, 0.999, 0.5),
    lambda: {"exp_avg": torch.ones(3)},
    lambda: {0: {}, "0": {}},
    lambda: [{}, {}],
    lambda: iter(()),
    lambda: lambda: 1,
]
"""Makers of what belongs at hardly any place of a checkpoint."""

TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.double(),
    lambda t: t.to(torch.float16),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.complex64).conj(),
    lambda t: torch.view_as_real(torch.complex(t.float(), t.float()).conj())[..., 1].to(t.dtype),
    lambda t: t.int(),
    lambda t: t.bool(),
    lambda t: t.to(torch.float8_e5m2),
    lambda t: t.reshape(-1),
    lambda t: t.unsqueeze(0),
    lambda t: t.unsqueeze(-1),
    lambda t: t.T if t.dim() == 2 else t[None],
    lambda t: t.expand(2, *t.shape),
    lambda t: t[..., :0] if t.dim() else t.expand(0),
    lambda t: torch.cat([t.reshape(-1)] * 2),
    lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape),
    lambda t: t.to("meta"),
    lambda t: t.float().to_sparse(),
    lambda t: t.as_subclass(_OfATensor),
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: t.tolist(),
    lambda t: t.numpy() if t.dtype is not torch.bfloat16 else t,
    lambda t: t.float().numpy().astype(object),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else ~t,
    lambda t: -t,
    lambda t: t + 0.5,
    lambda t: str(t),
    lambda t: {"t": t},
    lambda t: [t],
    lambda t: t.untyped_storage(),
    lambda t: torch.as_strided(t, t.shape, [0] * t.dim()),
]
"""What may become of a tensor."""

NUMBERS: list[Callable[[Any], Any]] = [
    lambda x: -x,
    lambda x: x + 0.5,
    lambda x: x + 1,
    lambda x: math.nan,
    lambda x: math.inf,
    lambda x: 1e300 * x,
    lambda x: 2**80,
    lambda x: bool(x),
    lambda x: str(x),
    lambda x: [x],
    lambda x: (x, x),
    lambda x: complex(x),
    lambda x: np.float64(x),
    lambda x: torch.tensor(float(x)),
    lambda x: torch.tensor([float(x), float(x)]),
    lambda x: None,
]
"""What may become of a number."""

KEYS: list[Any] = [
    None,
    True,
    1,
    0,
    -1,
    1.0,
    0.0,
    math.nan,
    "0",
    "1",
    "step",
    "params",
    "lr",
    "exp_avg",
    (0,),
    b"0",
    10**30,
]


def _places(node: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yields all containers of a checkpoint with each of their keys."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        if depth < 6:
            yield from _places(value, depth + 1)


def _mutate(chance: random.Random, root: dict[str, Any]) -> str:
    """Changes one thing in a checkpoint; returns what."""
    # By depth: else most changes would be of tensors, of which there are many.
    by_container: dict[int, list[tuple[Any, Any]]] = {}
    for place in _places(root):
        by_container.setdefault(id(place[0]), []).append(place)
    node, key = chance.choice(chance.choice(list(by_container.values())))
    value, kind = node[key], chance.randrange(8)
    where = f"{type(node).__name__}[{key!r}]"
    if kind == 0:
        del node[key]
        return f"{where} deleted"
    if kind == 1 and isinstance(node, dict):
        new = chance.choice(KEYS)
        node[new] = chance.choice(VALUES)()
        return f"{where}: a new key {new!r}"
    if kind == 2 and isinstance(node, dict):
        new = chance.choice(KEYS)
        node[new] = node.pop(key)
        return f"{where} renamed {new!r}"
    if kind == 3 and isinstance(node, list):
        node.insert(chance.randrange(len(node) + 1), chance.choice([value, chance.choice(VALUES)()]))
        return f"{where} longer"
    if kind == 4:
        node[key] = chance.choice([node, root, [node], (root,)])
        return f"{where} cyclic"
    if isinstance(value, Tensor) and kind < 7:
        which = chance.randrange(len(TENSORS))
        try:
            node[key] = TENSORS[which](value)
            return f"{where} a tensor of kind {which}"
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            pass  # this tensor cannot become that
    elif isinstance(value, (int, float)) and kind < 7:
        which = chance.randrange(len(NUMBERS))
        node[key] = NUMBERS[which](value)
        return f"{where} a number of kind {which}"
    which = chance.randrange(len(VALUES))
    node[key] = VALUES[which]()
    return f"{where} replaced by value {which}"


def malformed(saved: dict[str, Any], seed: int) -> tuple[str, Any]:
    """Returns a copy of a checkpoint with one to three changes, and a word on each."""
    chance = random.Random(seed)
    root: Any = copy.deepcopy(saved)
    changes = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        changes.append(_mutate(chance, root))
        if "cyclic" in changes[-1]:
            break
    if chance.randrange(40) == 0:
        return "the whole replaced", chance.choice(VALUES)()
    return "; ".join(changes), root
