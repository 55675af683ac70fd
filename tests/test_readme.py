"""What the documents show is true: their Python runs, their links, pictures and files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path, language):
    return re.findall(rf"(?m)^```{language}\n((?:.|\n)*?)^```", path.read_text())


SNIPPETS = [
    pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, code in enumerate(blocks(path, "python"), start=1)
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_in_the_documents_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {"__name__": "document"})


@every_document
def test_python_that_needs_more_than_this_machine_can_be_read(path):
    """Blocks marked `py` instead of `python` need a GPU or several processes; each is at least Python."""
    for code in blocks(path, "py"):
        compile(code, str(path), "exec")


def anchors(path):
    """The names under which a document's headings can be linked to, on GitHub and on the site."""
    text = re.sub(r"(?s)^```.*?^```", "", path.read_text(), flags=re.MULTILINE)
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@every_document
def test_links_and_pictures_exist(path):
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", path.read_text()):
        if "://" in target:
            continue
        there = path.parent / target if target else path
        assert there.exists(), f"{path.name} points to {target}, which does not exist"
        assert not anchor or anchor in anchors(there), f"{path.name} points to {target}#{anchor}: {anchors(there)}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


DIFF = blocks(ROOT / "docs" / "adding-an-optimizer.md", "diff")


def test_the_diff_of_the_documents_is_the_code():
    code = "\n".join(path.read_text() for folder in ("fusedopt", "kernels") for path in (ROOT / folder).rglob("*.py"))
    there = set(code.splitlines())
    added = [line[1:] for block in DIFF for line in block.splitlines() if line.startswith("+")]
    assert len(added) > 50
    assert [line for line in added if line not in there] == []
