"""What the documents show is true: their Python runs, their links, pictures and files exist."""

import ast
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


ADDING = ROOT / "docs" / "adding-an-optimizer.md"


def stands_in(lines, text):
    """True if a text has these lines, in this order."""
    rest = iter(text.splitlines())
    return all(line in rest for line in lines)


def test_the_diff_of_the_documents_is_the_code():
    code = [path.read_text() for folder in ("fusedopt", "kernels") for path in (ROOT / folder).rglob("*.py")]
    parts = [part for block in blocks(ADDING, "diff") for part in re.findall(r"(?m)(?:^\+.*\n)+", block)]
    added = [[line[1:] for line in part.splitlines()] for part in parts]
    assert sum(map(len, added)) > 50
    assert [lines for lines in added if not any(stands_in(lines, text) for text in code)] == []


def lines_of(path, name):
    """The numbers of the lines of a function or class, its decorators included."""
    (node,) = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name]
    return range(min(line.lineno for line in (node, *node.decorator_list)), node.end_lineno + 1)


def lines_about_lion(path):
    """The numbers of the lines that name Lion, and of all lines of what has its name: functions, classes, entries."""
    text = path.read_text()
    found = {number for number, line in enumerate(text.splitlines(), start=1) if "lion" in line.lower()}
    if path.suffix == ".py":
        tree = ast.parse(text)
        for node in tree.body:
            if "lion" in getattr(node, "name", "").lower():
                found.update(lines_of(path, node.name))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and "lion" in str(key.value).lower():
                    found.update(range(key.lineno, value.end_lineno + 1))
    return found


OWN = {
    "fusedopt/lion.py": [("Lion",), ("LionHyper",)],
    "kernels/fusedopt_kernels/lion.py": [("prologue", "update")],
    "fusedopt/backends/eager/lion.py": [("EagerLion",)],
}
"""Files that are about Lion alone, and the definitions whose lines the page counts beside those of the file."""

COUNTS = re.findall(r"(?m)^\| ([^|]+) \| ([^|]*`[^|]*) \| ([^|]+) \|$", ADDING.read_text())


@pytest.mark.parametrize("files, says", [row[1:] for row in COUNTS], ids=[row[0] for row in COUNTS])
def test_an_optimizer_takes_as_many_lines_as_the_page_says(files, says):
    paths = [path for name in re.findall(r"`([^`]+)`", files) for path in sorted(ROOT.glob(name))]
    assert paths and all(map(lines_about_lion, paths))
    counted = [int(number) for number in re.findall(r"\d+", says)]
    if own := OWN.get(files.strip("`")):
        (path,) = paths
        defined = [sum(len(lines_of(path, name)) for name in names) for names in own]
        assert counted == [*defined, len(path.read_text().splitlines())]
    elif counted:
        assert counted == [sum(len(lines_about_lion(path)) for path in paths)]


def test_paths_to_look_at_exist():
    """Each is given from one of three folders, so that a reader knows where to begin."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("\nWhere to look")[2].partition("\n## ")[0]
    paths = re.findall(r"`([\w/*]+(?:\.py|/))`", table)
    assert len(paths) > 40
    folders = (ROOT / "fusedopt", ROOT / "kernels", ROOT)
    assert [path for path in paths if sum(any(folder.glob(path)) for folder in folders) != 1] == []
