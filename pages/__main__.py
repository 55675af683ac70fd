"""`python -m pages`: writes what stands between marks in `docs/`, and the drawing of a step.

python -m pages            writes all parts
python -m pages errors     one of them
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fusedopt import files

ROOT = Path(__file__).parent.parent


def _record() -> str:
    from fusedopt_kernels.adamw import ADAMW
    from pages.launches import record_table

    return record_table(ADAMW.row)


def _counted() -> str:
    from pages.launches import counted

    return counted()


def _errors() -> str:
    from pages.errors import page

    return page()


def _support() -> str:
    from pages import support

    return support.table(support.collect())


PARTS: Mapping[str, tuple[str, Callable[[], str]]] = {
    "errors": ("docs/errors.md", _errors),
    "support": ("docs/support.md", _support),
    "record": ("docs/how-it-works.md", _record),
    "launches": ("docs/how-it-works.md", _counted),
}
"""By the name of its marks: where a part stands, and the function that makes it."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pages", description="Writes the parts of docs/ made from the code."
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    chosen = parser.parse_args(arguments).parts or list(PARTS)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    from pages.drawing import svg
    from perf.report import filled

    for name in chosen:
        path, make = ROOT / PARTS[name][0], PARTS[name][1]
        files.write_text(path, filled(path.read_text(), name, make()))
        print(f"{PARTS[name][0]}: {name}")
    files.write_text(ROOT / "docs/img/step.svg", svg())


if __name__ == "__main__":
    main()
