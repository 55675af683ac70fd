"""What a step launches and moves, counted; and what a row of the launch table holds."""

import warnings
from collections.abc import Sequence

from fusedopt_kernels.record import ADDRESS, FLOAT, INTEGER, NUMBER, TENSOR, Field, Record
from perf import report
from perf.cases import CASES, Case
from perf.static_report import count
from perf.traffic import OWNERS

KINDS: Sequence[tuple[Field, str]] = (
    (TENSOR, "address of a tensor; its dtype is part of the launch class"),
    (ADDRESS, "address, 0 for none"),
    (INTEGER, "whole number"),
    (FLOAT, "float64"),
    (NUMBER, "number, or the address of one on the device"),
)

MEANINGS = {
    "param": "the parameter, or its local shard",
    "grad": "its gradient; 0 where there is none in this step",
    "exp_avg": "state",
    "exp_avg_sq": "state",
    "max_exp_avg_sq": "state, with amsgrad",
    "master": "what completes a 16-bit weight: remainder or float32 copy",
    "step": "the step count, float64",
    "number": "the parameter's number, for random rounding",
    "numel": "elements",
    "hyper_index": "which set of hyper-parameters",
    "shard_length": "for random rounding: where the shard's elements are in the whole parameter",
    "shard_gap": "as above",
    "shard_offset": "as above",
    "pieces": "into how many the update cuts the tensor",
    "measures": "for statistics: where the measures of its pieces begin",
    "measures_at": "for statistics: where those of the whole tensor go",
}


def record_table(record: Record) -> str:
    """Returns the fields of a row as Markdown, with the first cell of each."""
    rows = [
        {
            "cell": str(getattr(record.places, name)),
            "field": f"`{name}`",
            "holds": next(text for known, text in KINDS if known is field),
            "": MEANINGS.get(name, ""),
        }
        for name, field in record.fields.items()
    ]
    return report.table(rows, markdown=True)


def counted(cases: Sequence[Case] = CASES) -> str:
    """Returns launches and bytes per parameter of the plain cases as Markdown; needs TRITON_INTERPRET=1."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bfloat16 loses updates is another page's subject
        for case in cases:
            if case.options or case.dtypes not in ("float32", "bfloat16"):
                continue
            found = count(case)
            read, written = (sum(found["bytes"][owner][i] for owner in OWNERS) for i in (0, 1))
            rows.append(
                {
                    "update": case.rule,
                    "dtype": case.dtypes,
                    "launches": str(found["launches"]),
                    "bytes read": f"{read:.1f}",
                    "bytes written": f"{written:.1f}",
                    "the least possible": f"{found['floor']:.0f}",
                }
            )
    return report.table(rows, markdown=True)
