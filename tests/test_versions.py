"""The table of versions is what its results say, and pyproject.toml asks for nothing that was not run."""

import re
from pathlib import Path

import pytest
import tomllib

from fusedopt import backends
from perf import report, results, versions

ROOT = Path(__file__).parent.parent
RECORDS = results.read(versions.RESULTS)


def record(**changes):
    known = dict(python="3.11.7", torch="2.13.0", triton="3.7.1", numpy="2.4.6", matplotlib="3.11.2")
    return {
        "kind": "tests",
        **known,
        "tests": ["tests/test_lion.py"],
        "passed": 3,
        "failed": 0,
        "date": "now",
        **changes,
    }


def least_versions():
    """Returns the lower bounds of pyproject.toml, of Python and the packages of the table."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["triton"]]
    found = [re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in wanted]
    bounds = {match[1]: match[2] for match in found if match and match[1] in versions.PACKAGES}
    return {"python": project["requires-python"].removeprefix(">="), **bounds}


def test_the_page_has_the_table_of_the_results():
    page = (ROOT / "docs" / "versions.md").read_text()
    assert page == report.filled(page, "versions", versions.table(RECORDS))


@pytest.mark.parametrize("name, least", least_versions().items())
def test_the_oldest_version_that_pyproject_takes_was_run(name, least):
    assert versions.was_run(name, least, RECORDS)
    assert name != "triton" or versions.numbers(least)[:2] == backends.OLDEST_TRITON


def test_pyproject_has_a_least_version_of_everything_in_the_table():
    assert least_versions().keys() == {"python", *versions.PACKAGES}


def test_every_other_python_has_compiled_every_file():
    compiled = {r["python"].rpartition(".")[0] for r in RECORDS if r["kind"] == "syntax"}
    missing = [name.removeprefix("python ") for name in versions.not_run(RECORDS) if name.startswith("python")]
    assert set(missing) <= compiled


def test_what_failed_was_not_run_and_what_is_missing_is_listed():
    records = [record(), record(triton="3.9.0", failed=1), record(numpy="1.26.4")]
    assert versions.was_run("triton", "3.7", records) and not versions.was_run("triton", "3.9.0", records)
    assert not versions.was_run("triton", "3.7.10", [record()])
    assert "triton 3.9.0" in versions.not_run(records) and "numpy 1.26.4" not in versions.not_run(records)
    assert versions.table(records).endswith(f"Not run: {', '.join(versions.not_run(records))}.")


def test_of_the_same_run_the_last_one_counts():
    records = [record(passed=1), record(passed=2), record(numpy="1.26.4")]
    assert [r["passed"] for r in versions.newest(records)] == [3, 2]  # the older numpy first


def test_an_interpreter_that_cannot_compile_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "perf").mkdir()
    (tmp_path / "perf" / "bad.py").write_text("def f(:\n")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="does not compile every file: SyntaxError"):
        versions.check_syntax(__import__("sys").executable)
