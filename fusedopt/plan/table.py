"""A plan as a table of at most 120 columns, and as data."""

from typing import Any, NamedTuple

import torch

from fusedopt.columns import aligned
from fusedopt.plan.costs import Cost


class Plan(NamedTuple):
    """What a run of a model would take of one GPU, by optimizer; `print` shows it as a table.

    Attributes:
        model: its name.
        parameters: elements of all its parameters.
        tensors: how many parameters it has.
        fsdp, tp: processes that share each parameter.
        bandwidth: bytes per second; None: milliseconds are left out.
        memory: bytes of a GPU; None: no row is marked.
        rows: one per choice, of the process that has the largest shards.
    """

    model: str
    parameters: int
    tensors: int
    fsdp: int
    tp: int
    bandwidth: float | None
    memory: float | None
    rows: list[Cost]

    def milliseconds(self, row: Cost) -> float | None:
        """Returns the time in which a GPU moves the bytes of a step; None without a bandwidth."""
        return None if self.bandwidth is None else row.moved / self.bandwidth * 1e3

    def fits(self, row: Cost) -> bool | None:
        """True if a GPU holds all that a row counts; None without a size."""
        return None if self.memory is None else row.total <= self.memory

    def data(self) -> dict[str, Any]:
        """Returns everything as JSON has it; memory and traffic in bytes."""
        rows = [
            {
                **row._asdict(),
                "reads": row.reads._asdict(),
                "options": {name: _plain(value) for name, value in row.options.items()},
                "total": row.total,
                "milliseconds": self.milliseconds(row),
                "fits": self.fits(row),
            }
            for row in self.rows
        ]
        return {**self._asdict(), "rows": rows}

    def __str__(self) -> str:
        return "\n".join([*self._heading(), "", *self._table(), "", *self._notes()])

    def _heading(self) -> list[str]:
        mesh = [f"{name} {number}" for name, number in (("fsdp", self.fsdp), ("tp", self.tp)) if number > 1]
        where = f"one of {self.fsdp * self.tp:,} GPUs ({' x '.join(mesh)})" if mesh else "one GPU"
        return [f"{self.model}: {self.parameters:,} parameters in {self.tensors:,} tensors, on {where}"]

    def _table(self) -> list[str]:
        unit, name = _unit(max(row.total for row in self.rows))
        decimals = 2 if max(row.moved for row in self.rows) < 1000 * unit else 0
        head = ["optimizer", "precision", "moments", "weights", "gradients", "states", "workspace", "total", "moved"]
        units = ["", "", "", *[name] * 6]
        table = [
            [
                *(row.optimizer, _precision(row), _moments(row)),
                *(_number(value, unit, decimals) for value in _memory(row)),
            ]
            for row in self.rows
        ]
        sides = "<<<>>>>>>"
        if self.bandwidth is not None:
            head, units, sides = [*head, "step"], [*units, "ms"], sides + ">"
            table = [[*line, f"{self.milliseconds(row):.2f}"] for line, row in zip(table, self.rows)]
        head, units, sides = [*head, "all-reduces"], [*units, ""], sides + ">"
        table = [[*line, _sums(row)] for line, row in zip(table, self.rows)]
        if self.memory is not None:
            head, units, sides = ["", *head], ["", *units], "<" + sides
            table = [["*" if self.fits(row) else "", *line] for line, row in zip(table, self.rows)]
        return aligned([head, units, *table], sides, gap=2)

    def _notes(self) -> list[str]:
        notes = []
        if self.memory is not None:
            fit = sum(map(bool, map(self.fits, self.rows)))
            notes.append(f"*: total is at most {size(self.memory)}; {fit} of {len(self.rows)} rows.")
        notes.append(
            "total = weights + gradients + states + workspace. Activations, and what FSDP gathers, come on top."
        )
        if self.bandwidth is not None:
            notes.append(f"step = moved / {size(self.bandwidth)}/s. Launches and all-reduces come on top.")
        notes.append(
            "moved = a x gradients + (b + 1) x (weights + what completes them) + 2 x moments; a and b are how often"
        )
        times = {row.optimizer: f"{row.optimizer} {row.reads.gradient} and {row.reads.weight}" for row in self.rows}
        notes.append(f"    a step of the kernels reads them: {', '.join(times.values())}.")
        if self.fsdp * self.tp > 1:
            notes.append("all-reduces: how many a step of the optimizer does, and the bytes in all of them together.")
            notes.append("Shards are not all of one length; these are the largest.")
        if any(row.workspace is None for row in self.rows):
            notes.append("?: known where triton is installed. total is without the workspace.")
        return notes


def _memory(row: Cost) -> list[int | None]:
    return [row.weights, row.gradients, row.states, row.workspace, row.total, row.moved]


def _precision(row: Cost) -> str:
    if row.options.get("master_weights"):
        return f"{row.dtype} master"
    if row.options.get("stochastic_rounding"):
        return f"{row.dtype} stochastic"
    return row.dtype if row.dtype not in ("bfloat16", "float16") else f"{row.dtype} nearest"


def _moments(row: Cost) -> str:
    return "/".join(dict.fromkeys(row.moments)) or "factored"


def _sums(row: Cost) -> str:
    if row.all_reduces is None or row.all_reduced is None:
        return "?"
    return f"{row.all_reduces}, {size(row.all_reduced)}" if row.all_reduces else "0"


def _number(value: int | None, unit: float, decimals: int) -> str:
    if value is None:
        return "?"
    least = 10.0**-decimals
    return f"<{least:g}" if 0 < value / unit < least / 2 else f"{value / unit:,.{decimals}f}"


_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def _unit(value: float) -> tuple[float, str]:
    """Returns the unit of a table whose largest number of bytes is this."""
    return next(((unit, name) for unit, name in _UNITS[1:4] if value >= 10 * unit), _UNITS[4])


def size(value: float) -> str:
    """Returns a number of bytes for a reader.

    Example:
        >>> size(87_520_768), size(80e9)
        ('87.5 MB', '80 GB')
    """
    unit, name = next(((unit, name) for unit, name in _UNITS if value >= unit), _UNITS[-1])
    return f"{value / unit:.3g} {name}"


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
