"""Pages that are made from the code are what the code says now."""

import doctest
import re
from pathlib import Path

import pytest

from fusedopt import public
from pages import __main__ as pages
from pages import drawing, errors, site, support
from perf import results

ROOT = Path(__file__).parent.parent
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\nnot_in_nav")[0]
SLOW = {"support": pytest.mark.slow, "launches": pytest.mark.slow}  # collect tests, or run kernels


def between(path: Path, name: str) -> str:
    return re.findall(rf"(?s)<!-- {name} -->\n(.*?)<!-- /{name} -->", path.read_text())[0].strip()


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in pages.PARTS])
def test_a_part_is_what_the_code_says(name):
    path, make = pages.PARTS[name]
    assert between(ROOT / path, name) == make().strip(), f"run python -m pages {name}"


def test_the_drawing_is_what_the_code_draws():
    assert (ROOT / "docs/img/step.svg").read_text() == drawing.svg(), "run python -m pages"


def test_every_field_of_a_row_is_explained():
    from fusedopt_kernels.adamw import ADAMW
    from pages.launches import MEANINGS

    assert ADAMW.row.fields.keys() - MEANINGS.keys() == set()


# Errors.

PARTS = [(part, entry) for entries in errors.TRAINING.values() for entry in entries for part in entry.parts]


@pytest.mark.parametrize("part", [part for part, _ in PARTS])
def test_an_explained_message_is_in_the_code(part):
    assert any(part in text for text in errors.literals())


def test_every_runtime_error_is_explained():
    runtime = {message.text for message in errors.messages() if message.kind == "RuntimeError"}
    assert len(runtime) > 25
    assert [text for text in runtime if errors.entry_of(text) is None] == []


def test_no_message_has_two_explanations():
    for message in errors.messages():
        entries = {id(entry) for part, entry in PARTS if part in message.text}
        assert len(entries) <= 1, message


def test_a_message_that_is_made_of_several_strings_is_read_as_one():
    (text,) = [m.text for m in errors.messages() if "got a second gradient" in m.text]
    assert text.startswith("… got a second gradient before step()") and text.endswith("register_step_in_backward")


# The support matrix.


def test_a_cell_without_a_test_says_that_it_was_not_run():
    row = support.Row("a row", ("test_a.py::test_it[@-*",))
    ids = ["test_a.py::test_it[AdamW-eager]", "test_a.py::test_it[AdamWeightDecay-keras]", "test_a.py::test_it[Lion]"]
    shown = [bool(support.shown_by(row, name, ids)) for name in support.OPTIMIZERS]
    assert shown == [True, True, False, False]


def test_cells_of_a_gpu_are_those_of_a_run_without_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "COMMITTED", tmp_path)
    assert support.passed_on_a_gpu() == []
    for gpu, outcome in (("one", "failed with exit code 1"), ("another", "done")):
        results.append(tmp_path / gpu / "parts.jsonl", [{"part": "NCCL on one process", "outcome": outcome}])
    passed = support.passed_on_a_gpu()
    assert "gpu:test_one_process.py::test_objects_go_through_the_group" in passed
    assert all(test.startswith("gpu:test_one_process.py::test_") for test in passed)


@pytest.mark.parametrize("name", support.files())
def test_a_file_of_the_matrix_exists(name):
    assert (ROOT / "tests" / name).exists()


@pytest.mark.parametrize("row", [row for rows in support.SECTIONS.values() for row in rows], ids=lambda row: row.what)
def test_the_functions_that_a_row_names_exist(row):
    """The ids of their parameters are held by the page itself, in `test_a_part_is_what_the_code_says`."""
    for optimizer in support.OPTIMIZERS:
        for pattern in row.patterns(optimizer):
            file, _, function = pattern.removeprefix(support.ON_A_GPU).partition("::")
            wanted = re.compile(f"def {re.escape(function.partition('[')[0]).replace(chr(92) + '*', '.*')}")
            assert wanted.search((ROOT / "tests" / file).read_text()), pattern


# The site.


def test_every_page_is_in_the_navigation_once():
    here = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    named = re.findall(r": (\S+\.md)$", NAV, re.MULTILINE)
    joined = {file.page for file in site.joined_files().values() if "/" not in file.page}
    assert sorted(named) == sorted(here | joined)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_a_page_begins_with_a_sentence(path):
    """It says what the page is about, and stands beside the title in llms.txt."""
    sentence = site.summary(path.read_text())
    assert re.fullmatch(r"[A-Z`a-z][^\n]{20,250}[.?:]", sentence), sentence


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    named = {line.rpartition(".")[2] for line in re.findall(r"(?m)^::: (\S+)$", text)}
    assert set(public.__all__) - named == set()


def test_a_notebook_becomes_a_page_with_its_pictures():
    joined = site.joined_files()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        file = joined[f"notebooks/{path.name}"]
        assert file.markdown.startswith("# ")
        shown = re.findall(r"\]\(([\w-]+\.png)\)", file.markdown)
        assert shown and {f"notebooks/{name}" for name in shown} == set(file.pictures)
        assert all(content.startswith(b"\x89PNG") for content in file.pictures.values())


@pytest.mark.parametrize(
    "link, page, at, expected",
    [
        ("../../examples/plain_pytorch.py", "training/plain.md", "", "../examples/plain_pytorch.md"),
        ("../notebooks/schedules.ipynb", "notebooks.md", "", "notebooks/schedules.md"),
        ("docs/sharding.md", "changelog.md", "CHANGELOG.md", "sharding.md"),
        (
            "../docs/low-precision.md",
            "notebooks/low_precision.md",
            "notebooks/low_precision.ipynb",
            "../low-precision.md",
        ),
        ("sharding.md#checkpoints", "index.md", "", "sharding.md#checkpoints"),
    ],
)
def test_links_to_files_outside_of_docs_lead_to_their_pages(link, page, at, expected):
    assert site.bent(f"[a]({link})", page, site.joined_files(), at) == f"[a]({expected})"


def test_examples_in_docstrings():
    for module in (site, support):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed
