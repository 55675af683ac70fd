"""Runs a primer, prints its table, and with --write puts table and picture into its page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fusedopt import files
from perf import report, results
from perf.primers import clipping, launches, second_moment, weight_decay

PRIMERS = {"weight-decay": weight_decay, "second-moment": second_moment, "clipping": clipping, "launches": launches}
"""By the name of its page: a module with the question and the run."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.primers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PRIMERS)}; all if none is named")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/")
    parser.add_argument("--results", type=Path, default=clipping.RESULTS, help="JSON lines of perf.bench, for clipping")
    options = parser.parse_args(arguments)
    for name in options.names or PRIMERS:
        if name not in PRIMERS:
            parser.error(f"a primer must be one of {', '.join(PRIMERS)}, got {name!r}")
        primer = PRIMERS[name]
        found = clipping.run(options.results) if name == "clipping" else primer.run()
        print(f"{str(primer.__doc__).splitlines()[0]}\n\n{report.table(found.rows)}\n")
        if options.write:
            page = results.ROOT / "docs" / "primers" / f"{name}.md"
            files.write_text(page, report.filled(page.read_text(), "numbers", report.table(found.rows, markdown=True)))
            files.save_figure(found.figure, results.ROOT / "docs" / "img" / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
