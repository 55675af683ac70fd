"""`python -m perf.versions`: with which versions of Python, torch, triton, numpy and matplotlib tests were run.

run TESTS...             runs tests in this environment, and adds what came out to the results
syntax PYTHON...         lets other interpreters compile every file, and adds what came out
table [--into FILE.md]   prints the table of all results, or puts it between the marks of a page
"""

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fusedopt import files
from perf import report, results
from perf.results import ROOT, Record

RESULTS = ROOT / "perf" / "results" / "versions.jsonl"

PACKAGES = ("torch", "triton", "numpy", "matplotlib")

WANTED = {
    "python": ("3.10", "3.11", "3.12", "3.13"),
    "torch": ("2.11.0", "2.13.0", "2.14.1"),
    "triton": ("3.6.0", "3.7.1", "3.8.0", "3.9.0"),
    "numpy": ("1.26.4", "2.4.6"),
    "matplotlib": ("3.9.4", "3.11.2"),
}
"""What there is to be run."""

_FILES = ("fusedopt", "kernels", "perf", "tests", "examples")

_COMPILE = """
import pathlib, sys
files = [path for folder in sys.argv[1:] for path in sorted(pathlib.Path(folder).rglob("*.py"))]
for path in files:
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
print(sys.version.split()[0], len(files))
"""


def run_tests(tests: Sequence[str]) -> Record:
    """Returns the record of a run of some test files here: versions, and how many passed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--basetemp", folder]
        done = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", last[0])}
    if not counts:
        raise RuntimeError(f"pytest has run no test: {last[0]}")
    outcome = {"passed": counts.get("passed", 0), "failed": counts.get("failed", 0) + counts.get("error", 0)}
    versions = {name: str(import_module(name).__version__).partition("+")[0] for name in PACKAGES}
    python = ".".join(map(str, sys.version_info[:3]))
    return {"kind": "tests", "date": _today(), "python": python, **versions, "tests": list(tests), **outcome}


def check_syntax(python: str) -> Record:
    """Returns the record of an interpreter that has compiled every file."""
    done = subprocess.run([python, "-c", _COMPILE, *_FILES], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python} does not compile every file: {done.stderr.strip().splitlines()[-1]}")
    version, files = done.stdout.split()
    return {"kind": "syntax", "date": _today(), "python": version, "files": int(files)}


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def newest(records: Sequence[Record]) -> list[Record]:
    """Returns the last record of each combination of versions and tests, in the order of their versions."""
    keys = ("kind", "python", *PACKAGES, "tests")
    last = {tuple(str(r.get(key)) for key in keys): r for r in records}
    return sorted(last.values(), key=lambda r: [numbers(str(r.get(name, "0"))) for name in ("python", *PACKAGES)])


def numbers(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version, which compare as versions do.

    Example:
        >>> numbers("3.10.0") > numbers("3.9")
        True
    """
    return tuple(map(int, re.findall(r"\d+", version)))


def was_run(name: str, version: str, records: Sequence[Record]) -> bool:
    """True if tests passed, and none failed, with this version."""
    passed = [str(r[name]) for r in records if r["kind"] == "tests" and r["passed"] and not r["failed"]]
    return any(one == version or one.startswith(f"{version}.") for one in passed)


def not_run(records: Sequence[Record]) -> list[str]:
    """Returns what of `WANTED` no tests were run with."""
    return [f"{name} {v}" for name, versions in WANTED.items() for v in versions if not was_run(name, v, records)]


def table(records: Sequence[Record]) -> str:
    """Returns all results as Markdown."""
    rows, syntax = [], []
    for r in newest(records):
        if r["kind"] == "syntax":
            syntax.append(f"{r['python']} ({r['files']} files, {r['date']})")
        else:
            tests = ", ".join(f"`{Path(test).name}`" for test in r["tests"])
            columns = {**{name: r[name] for name in ("python", *PACKAGES)}, "tests": tests}
            columns |= {name: r[name] for name in ("passed", "failed", "date")}
            rows.append({name: str(cell) for name, cell in columns.items()})
    paragraphs = [report.table(rows, markdown=True)]
    paragraphs += [f"Every file compiles with Python {', '.join(syntax)}."] if syntax else []
    paragraphs += [f"Not run: {', '.join(missing)}."] if (missing := not_run(records)) else []
    return "\n\n".join(paragraphs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.versions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands: Any = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("tests", nargs="+", metavar="TESTS")
    commands.add_parser("syntax").add_argument("pythons", nargs="+", metavar="PYTHON")
    commands.add_parser("table").add_argument("--into", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    if options.command == "run":
        results.append(RESULTS, [run_tests(options.tests)])
    elif options.command == "syntax":
        results.append(RESULTS, map(check_syntax, options.pythons))
    records = results.read(RESULTS)
    if options.command == "table" and options.into:
        files.write_text(options.into, report.filled(options.into.read_text(), "versions", table(records)))
    else:
        print(table(records))


if __name__ == "__main__":
    main()
