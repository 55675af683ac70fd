"""Records: what a row of a launch table holds, declared once for the host and for the kernels.

A `Record` names its fields in order. The host fills a numpy structured array of `Record.dtype` by name; a kernel gets
the place of each field, in cells of 8 bytes, as a constexpr argument: `tl.load(row + T.row.grad)`. It must be an
argument: the key under which Triton keeps compiled kernels leaves out what they read from a module.
"""

from collections import namedtuple
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Field(NamedTuple):
    """A kind of field.

    Attributes:
        dtype: of the field on the host.
        is_tensor: True for the address of a tensor whose dtype the kernel is compiled for.
    """

    dtype: Any
    is_tensor: bool = False


INTEGER = Field(np.dtype(np.int64))
"""A size, an offset, a flag, or the number of a row in another table."""

ADDRESS = Field(np.dtype(np.int64))
"""Where a tensor of a known dtype lies on the device; 0 for none."""

TENSOR = Field(np.dtype(np.int64), is_tensor=True)
"""Where a tensor lies whose dtype is part of the launch class; 0 for none."""

FLOAT = Field(np.dtype(np.float64))
"""A float64, which the kernel finds as its bits among int64."""

NUMBER = Field(np.dtype([("value", np.float64), ("at32", np.int64), ("at64", np.int64)]))
"""A number by value, or else at the address of a float32 or of a float64 on the device; see `device.load_number`."""

_CELL = 8


class Record:
    """A row of a table: fields in order, filled up to a multiple of 128 bytes.

    Attributes:
        fields: kind of each field, by name.
        dtype: numpy structured dtype of a row.
        places: NamedTuple with the first cell of each field, and `length`, the number of cells in a row.
        tensors: names of the fields that are a `TENSOR`.

    Example:
        >>> row = Record(grad=TENSOR, lr=NUMBER, numel=INTEGER)
        >>> row.places
        Places(grad=0, lr=1, numel=4, length=16)
        >>> rows = row.rows(2)
        >>> rows["numel"] = 7, 8
        >>> cells(rows)[:, row.places.numel].tolist()
        [7, 8]
    """

    def __init__(self, **fields: Field) -> None:
        self.fields = fields
        starts, cells = [], 0
        for field in fields.values():
            starts.append(cells)
            cells += field.dtype.itemsize // _CELL
        length = cells + -cells % 16
        self.dtype = np.dtype(
            {
                "names": list(fields),
                "formats": [field.dtype for field in fields.values()],
                "offsets": [start * _CELL for start in starts],
                "itemsize": length * _CELL,
            }
        )
        self.places: Any = _named(fields, starts, length)
        self._zeros = [(name, (0.0, 0, 0) if field is NUMBER else 0) for name, field in fields.items()]
        self.tensors = tuple(name for name, field in fields.items() if field.is_tensor)

    def rows(self, number: int) -> np.ndarray:
        """Returns rows of zeros, a structured array."""
        return np.zeros(number, self.dtype)

    def row(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Returns a row with these values, to be assigned to one of `rows`; zeros for other fields."""
        return tuple([values.get(name, zero) for name, zero in self._zeros])


def _named(fields: Iterable[str], starts: list[int], length: int) -> Any:
    make: Any = namedtuple
    return make("Places", [*fields, "length"])(*starts, length)


def cells(rows: np.ndarray) -> np.ndarray:
    """Returns the same rows as int64 [rows, cells]."""
    return rows.view(np.int64).reshape(len(rows), -1)


def copied(rows: np.ndarray) -> np.ndarray:
    """Returns a copy of rows, with the zeros behind the last field, which numpy's `copy` leaves to chance."""
    return rows.view(np.int64).copy().view(rows.dtype)


class Tables(NamedTuple):
    """The places of the fields of all records of a kernel, as its constexpr argument.

    Attributes:
        row: of the launch table's rows.
        hyper: of its sets of hyper-parameters.
        scalars: of what the prologue leaves for each row, float64.
        random: whether it leaves keys for stochastic rounding.
        measures: the places of `measures.Measures`, for kernels that leave them; None: they do not.
    """

    row: Any
    hyper: Any = None
    scalars: Any = None
    random: bool = False
    measures: Any = None
