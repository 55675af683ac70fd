"""What the documents show is true: their Python runs, their pictures and files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SNIPPETS = [
    pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), start=1)
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_in_the_documents_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {"__name__": "document"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} points to {target}, which does not exist"


DIFF = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "adding-an-optimizer.md").read_text(), re.DOTALL)


def test_the_diff_of_the_documents_is_the_code():
    code = "\n".join(path.read_text() for folder in ("fusedopt", "kernels") for path in (ROOT / folder).rglob("*.py"))
    there = set(code.splitlines())
    added = [line[1:] for block in DIFF for line in block.splitlines() if line.startswith("+")]
    assert len(added) > 50
    assert [line for line in added if line not in there] == []
