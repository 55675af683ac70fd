"""LaunchTable: which memory one launch works on, as tables on the device.

`rows` has one row of int64 per tensor that is updated: addresses and sizes, in columns that the kernel names.
`hyper` has one row per set of hyper-parameters; its float64 travel as int64 bits, in the same upload. `chunks` has one row
(row, piece) of int32 per program of a launch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS_PER_PROGRAM = 128
"""Tables are padded with rows of zeros to a multiple of it, so that kernels that walk over rows need no count."""

_NOWHERE = 16  # The address of tensors without elements, which have none: 0 would say that there is no tensor.

_DTYPES: tuple[torch.dtype | None, ...] = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

Upload = Callable[[np.ndarray, torch.device], Tensor]
"""Brings int64 from the host to a new tensor on the device, without waiting for the device."""


class LaunchClass(NamedTuple):
    """What the tensors of one launch have in common.

    Attributes:
        dtypes: of the tensors in each column, None where there is none.
        even: whether all addresses are multiples of 16 bytes and all sizes of 16 elements.
    """

    dtypes: tuple[torch.dtype | None, ...]
    even: bool


def upload(host: np.ndarray, device: torch.device) -> Tensor:
    """Copies through a pinned block of its own, which torch's allocator keeps until the copy is done."""
    staging = torch.empty(host.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    staging.numpy()[...] = host
    return torch.empty(host.shape, dtype=torch.int64, device=device).copy_(staging, non_blocking=True)


class LaunchTable:
    """The tables of one optimizer's launches on one device.

    Attributes:
        rows: int64 [rows, columns] on the device.
        hyper: int64 [batches, hyper-parameters] on the device, float64 as their bits.
    """

    def __init__(self, device: torch.device, upload: Upload = upload) -> None:
        self.device = device
        self._upload = upload
        self._stream: int | None = None
        self._host = np.empty(0, np.int64)
        self._chunked: dict[str, tuple[np.ndarray, np.ndarray, dict[int, Tensor]]] = {}

    def update(self, rows: np.ndarray, hyper: np.ndarray) -> None:
        """Brings the tables to the device if anything in them changed.

        Args:
            rows: int64 [tensors, columns].
            hyper: int64 [batches, hyper-parameters]; an even number of them, so that `rows` stays aligned behind it.
        """
        stream = _stream(self.device)
        if stream != self._stream:  # Memory of another stream may be given away while this one still reads it.
            self._host, self._chunked, self._stream = np.empty(0, np.int64), {}, stream
        padded = -(-len(rows) // ROWS_PER_PROGRAM) * ROWS_PER_PROGRAM
        host = np.zeros(hyper.size + padded * rows.shape[1], np.int64)
        host[: hyper.size] = hyper.ravel()
        host[hyper.size : hyper.size + rows.size] = rows.ravel()
        if np.array_equal(host, self._host):
            return
        self._host = host
        table = self._upload(host, self.device)
        self.hyper = table[: hyper.size].view(hyper.shape)
        self.rows = table[hyper.size :].view(padded, rows.shape[1])

    def chunks(self, phase: str, keys: np.ndarray, pieces: np.ndarray) -> dict[int, Tensor]:
        """The programs of a phase: key of a launch to int32 [programs, 2], each program a (row, piece).

        Tensors of this dict are never written again.

        Args:
            phase: a name; a phase's chunks are made again only when `keys` or `pieces` changed.
            keys: int64 [tensors]; those with the same key share a launch.
            pieces: int64 [tensors]; how many pieces each is cut into.
        """
        known = self._chunked.get(phase)
        if known is None or not (np.array_equal(known[0], keys) and np.array_equal(known[1], pieces)):
            known = self._chunked[phase] = keys, pieces, self._cut(keys, pieces)
        return known[2]

    def _cut(self, keys: np.ndarray, pieces: np.ndarray) -> dict[int, Tensor]:
        launches = np.unique(keys[pieces > 0])
        return {int(key): self._programs(np.flatnonzero((keys == key) & (pieces > 0)), pieces) for key in launches}

    def _programs(self, rows: np.ndarray, pieces: np.ndarray) -> Tensor:
        counts = pieces[rows]
        total = int(counts.sum())
        short = self._upload(np.stack([rows, np.cumsum(counts) - counts, counts]), self.device)
        row, first = short[:2].repeat_interleave(short[2], dim=1, output_size=total)
        return torch.stack([row, torch.arange(total, device=self.device) - first], dim=1).to(torch.int32)


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each tensor lies; 0 for None."""
    return [0 if t is None else t.data_ptr() or _NOWHERE for t in tensors]


def launch_keys(dtypes: Sequence[Sequence[torch.dtype | None]], even: np.ndarray) -> np.ndarray:
    """The launch class of each row as a number that `launch_class` turns back.

    Args:
        dtypes: [columns][rows].
        even: bool [rows].

    Raises:
        KeyError: a dtype that kernels do not know.
    """
    keys = even.astype(np.int64)
    for place, column in enumerate(dtypes):
        keys |= np.fromiter(map(_CODES.__getitem__, column), np.int64, len(even)) << (3 * place + 1)
    return keys


def launch_class(key: int, columns: int) -> LaunchClass:
    """The launch class that a number of `launch_keys` stands for."""
    return LaunchClass(tuple(_DTYPES[key >> (3 * place + 1) & 7] for place in range(columns)), bool(key & 1))


def even(rows: np.ndarray) -> np.ndarray:
    """Which rows allow 128-bit accesses, given int64 [rows, addresses and sizes that count]: all multiples of 16."""
    return (np.bitwise_or.reduce(rows, axis=1) & 15) == 0


def float_bits(values: Sequence[Sequence[float]]) -> np.ndarray:
    """float64 as the int64 with the same bits."""
    return np.array(values, np.float64).view(np.int64)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
