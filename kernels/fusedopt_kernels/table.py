"""Launch tables: which memory the programs of a launch work on, and how it gets to the device.

`rows` has a row per tensor that is updated: addresses and sizes. `hyper` has a row per set of hyper-parameters. Both
are declared as a `record.Record`; on the device both are int64, float64 as their bits, so that they travel in one copy.
`chunks` has a row of int32 per program of a launch: (row, piece), the tensor that it works on and which piece of it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels.memory import lasting
from fusedopt_kernels.record import cells

ROWS_PER_PROGRAM = 128
"""Rows of zeros fill a table up to a multiple of it: kernels that walk over rows need no count, and nothing to mask."""

_NOWHERE = 16  # Stands for the address of a tensor without elements, which has none: 0 says that there is no tensor.

_LOW = 1 << 40  # In memory that was freed and begins at 0, a view lies as far from 0 as it does from its beginning.

_DTYPES: tuple[torch.dtype | None, ...] = (
    *(None, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.int16,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_BITS = 3
_FLAGS = 4

Upload = Callable[[np.ndarray, torch.device], Tensor]
"""Copies int64 from the host into a new tensor on the device, without waiting for the device."""


def upload(host: np.ndarray, device: torch.device) -> Tensor:
    """Copies through a pinned block used only for this: the host runs ahead of the copy, after which it is free."""
    staging = lasting(host.shape, torch.int64, "cpu", pinned=device.type == "cuda")
    staging.numpy()[...] = host
    return lasting(host.shape, torch.int64, device).copy_(staging, non_blocking=True)


class LaunchClass(NamedTuple):
    """The properties that the tensors of one launch share.

    Attributes:
        dtypes: of the tensors in each column; None where there is none.
        aligned: whether all addresses are multiples of 16 bytes and all sizes, and positions of shards, of 16 elements.
        rounding: of `storage`: what is rounded stochastically.
        sharded: whether that depends on where shards are in their tensors.
    """

    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool
    rounding: int = 0
    sharded: bool = False


class LaunchTable:
    """The tables of one optimizer's launches on one device, on whatever stream is current there.

    What is on the device is never written again: a change makes new tensors, so that what is queued, or captured, keeps
    reading what it was given.

    Attributes:
        rows: int64 [rows, cells], on the device.
        hyper: int64 [sets of hyper-parameters, cells], on the device.
    """

    rows: Tensor
    hyper: Tensor
    _host: np.ndarray

    def __init__(self, device: torch.device, upload: Upload = upload) -> None:
        self.device = device
        self._upload = upload
        self._warm: set[tuple[str, int]] = set()
        self._may_warm = True
        self._forget()

    def for_capture(self, upload: Upload) -> "LaunchTable":
        """A table for a captured step: it shares the chunks that there are, and refuses launches that never ran."""
        table = LaunchTable(self.device, upload)
        table._chunks = dict(self._chunks)
        table._warm, table._may_warm = self._warm, False
        return table

    def update(self, rows: np.ndarray, hyper: np.ndarray | None = None) -> None:
        """Brings the tables to the device if anything in them changed.

        Args:
            rows: [tensors], of a record.
            hyper: [sets], of a record; None for a kernel without hyper-parameters. Its length is a multiple of 16
                bytes, so that `rows` behind it is aligned.
        """
        rows = cells(rows)
        hyper = np.empty((0, 0), np.int64) if hyper is None else cells(hyper)
        if _stream(self.device) != self._stream:
            # Memory belongs to the stream it was made on, and may be given away while another one still reads it.
            self._forget()
        height = -(-len(rows) // ROWS_PER_PROGRAM) * ROWS_PER_PROGRAM
        host = np.zeros(hyper.size + height * rows.shape[1], np.int64)
        host[: hyper.size] = hyper.ravel()
        host[hyper.size : hyper.size + rows.size] = rows.ravel()
        if not np.array_equal(host, self._host):
            table = self._upload(host, self.device)
            self._host = host
            self.hyper = table[: hyper.size].view(hyper.shape)
            self.rows = table[hyper.size :].view(height, rows.shape[1])

    def chunks(self, phase: str, keys: np.ndarray, pieces: np.ndarray) -> dict[int, Tensor]:
        """The launches of a phase: key to int32 [programs, 2]. Made again only when `keys` or `pieces` changed.

        Args:
            phase: a name; every phase has chunks of its own.
            keys: int64 [tensors]; those with the same key share a launch.
            pieces: int64 [tensors]; how many pieces each is cut into.

        Raises:
            RuntimeError: during a capture, a launch that no step before it had: its kernel may not be compiled yet.
        """
        known = self._chunks.get(phase)
        if known is None or not (_equal(known[0], keys) and _equal(known[1], pieces)):
            wanted = set(keys[pieces > 0].tolist())
            new = {(phase, key) for key in wanted} - self._warm
            if new and not self._may_warm:
                raise RuntimeError(
                    "a CUDA graph is being captured, and no step before it had tensors of these dtypes and alignments: "
                    "take one step like the captured one before the capture, so that its kernels are compiled"
                )
            launches = {key: self._cut(np.flatnonzero((keys == key) & (pieces > 0)), pieces) for key in sorted(wanted)}
            known = self._chunks[phase] = keys, pieces, launches
            self._warm |= new
        return known[2]

    def _cut(self, rows: np.ndarray, pieces: np.ndarray) -> Tensor:
        """Spelled out on the device: a large model has a hundred thousand chunks, but few rows to copy."""
        counts = pieces[rows]
        total = int(counts.sum())
        short = self._upload(np.stack([rows, np.cumsum(counts) - counts, counts]), self.device)
        row, first = short[:2].repeat_interleave(short[2], dim=1, output_size=total)
        piece = torch.arange(total, dtype=torch.int64, device=self.device) - first
        return lasting((total, 2), torch.int32, self.device).copy_(torch.stack([row, piece], dim=1))

    def scratch(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for what the launches of one step hand to each other; the same at every step, not initialised."""
        known = self._scratch.get(name)
        if known is None or known.shape != shape or known.dtype != dtype:
            known = self._scratch[name] = lasting(shape, dtype, self.device)
        return known

    @property
    def workspace(self) -> int:
        """Bytes that the scratch memory and the chunks take on the device."""
        chunks = [t for _, _, launches in self._chunks.values() for t in launches.values()]
        return sum(t.nbytes for t in (*self._scratch.values(), *chunks))

    def _forget(self) -> None:
        self._stream = _stream(self.device)
        self._host = np.empty(0, np.int64)
        self._chunks: dict[str, tuple[np.ndarray, np.ndarray, dict[int, Tensor]]] = {}
        self._scratch: dict[str, Tensor] = {}


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each tensor lies; 0 for None.

    Raises:
        RuntimeError: a tensor has elements, but no memory of its own.
    """
    return [0 if t is None else at if (at := t.data_ptr()) >= _LOW else _low(t, at) for t in tensors]


def address_column(tensors: Sequence[Tensor | None]) -> np.ndarray:
    """`addresses`, int64; fast where there is a tensor in each place."""
    try:
        column = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))  # type: ignore[arg-type]
        if (column >= _LOW).all():
            return column
    except TypeError:  # None is among them
        pass
    return np.array(addresses(tensors), np.int64)


def _low(t: Tensor, at: int) -> int:
    """The address of a tensor that lies at one as low as that of a tensor without memory."""
    if at > t.storage_offset() * t.element_size():
        return at
    if t.numel() and not t.is_meta:  # States without data are recognised elsewhere, where their parameter is known.
        raise RuntimeError(f"a {type(t).__name__} of shape {tuple(t.shape)} has no memory that a kernel could reach")
    return _NOWHERE


def dtype_codes(dtypes: Sequence[torch.dtype | None]) -> np.ndarray:
    """A small number per dtype, int64.

    Raises:
        RuntimeError: a dtype that the kernels cannot read.
    """
    unknown = set(dtypes) - _CODES.keys()
    if unknown:
        raise RuntimeError(
            f"{unknown.pop()} is no dtype that the kernels read: parameters, gradients and states must be float16, "
            "bfloat16, float32 or float64"
        )
    return np.array([_CODES[dtype] for dtype in dtypes], np.int64)


def launch_keys(
    codes: Sequence[np.ndarray], aligned: np.ndarray, rounding: np.ndarray | int = 0, sharded: np.ndarray | bool = False
) -> np.ndarray:
    """The launch class of each row as a number, from the `dtype_codes` of each column and the rest of the class."""
    keys: np.ndarray = aligned.astype(np.int64) | rounding << 1 | np.int64(sharded) << 3
    for place, column in enumerate(codes):
        keys |= column << (_BITS * place + _FLAGS)
    return keys


@cache
def launch_class(key: int, columns: int) -> LaunchClass:
    """The launch class that a number from `launch_keys` stands for."""
    codes = [key >> (_BITS * place + _FLAGS) & (1 << _BITS) - 1 for place in range(columns)]
    return LaunchClass(tuple(_DTYPES[code] for code in codes), bool(key & 1), key >> 1 & 3, bool(key & 8))


def are_aligned(numbers: np.ndarray) -> np.ndarray:
    """Which rows allow 128-bit accesses, given the addresses and sizes that matter, int64 [rows, numbers]."""
    aligned: np.ndarray = (np.bitwise_or.reduce(numbers, axis=1) & 15) == 0
    return aligned


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or np.array_equal(a, b)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
