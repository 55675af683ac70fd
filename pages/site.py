"""A hook of mkdocs: files from outside `docs/` become pages, links are bent to them, `llms.txt` is written."""

from __future__ import annotations

import json
import posixpath
import re
from base64 import b64decode
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.nav import Navigation
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent


class Joined(NamedTuple):
    """A file of the repository as the site has it."""

    page: str  # its address below `docs/`
    markdown: str
    pictures: dict[str, bytes] = {}  # by their address below `docs/`


@cache
def joined_files() -> dict[str, Joined]:
    """Returns the files from outside `docs/` that are part of the site, by their path in the repository."""
    found = {f"{name.upper()}.md": Joined(f"{name}.md", (ROOT / f"{name.upper()}.md").read_text()) for name in _TEXTS}
    for path in sorted((ROOT / "examples").glob("*.py")):
        address = f"examples/{path.name}"
        found[address] = Joined(f"examples/{path.stem}.md", f"# {path.name}\n\n{_fenced(path.read_text(), 'python')}")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found[f"notebooks/{path.name}"] = _notebook(path)
    return found


_TEXTS = ("changelog", "contributing")


def _fenced(text: str, language: str = "text") -> str:
    return f"~~~{language}\n{text.strip()}\n~~~\n"


def _notebook(path: Path) -> Joined:
    """Returns a notebook as Markdown: its text, its code, and what it printed and drew when it was last run."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[f"notebooks/{name}"] = b64decode(data["image/png"])
                parts.append(f"![a picture that this cell draws]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).strip():
                parts.append(_fenced(text))
    return Joined(f"notebooks/{path.stem}.md", "\n\n".join(parts), pictures)


_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def bent(markdown: str, page: str, joined: dict[str, Joined], at: str = "") -> str:
    """Returns a page's Markdown with links to files outside `docs/` bent to their pages.

    Args:
        markdown: the text.
        page: its address below `docs/`.
        joined: what `joined_files` returns.
        at: the path in the repository that the text's links start from; "docs/" and `page` if not given.
    """
    folder = posixpath.dirname(at or f"docs/{page}")

    def bend(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        here = posixpath.dirname(page) or "."
        if target in joined:
            return posixpath.relpath(joined[target].page, here)
        if at and target.startswith("docs/"):
            return posixpath.relpath(target.removeprefix("docs/"), here)
        return match[1]

    return _LINK.sub(bend, markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    joined = joined_files()
    for path, file in joined.items():
        code = path.endswith(".py")
        text = file.markdown if code else bent(file.markdown, file.page, joined, at=path)
        files.append(File.generated(config, file.page, content=text))
        for address, content in file.pictures.items():
            files.append(File.generated(config, address, content=content))
    return files


BOOST = {"errors.md": 4.0, "low-precision.md": 1.5}
"""How much more a page counts in the search than others. Code and notebooks count less: they hold many words."""


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    page.meta["search"] = {"boost": 0.3 if page.file.generated_by else BOOST.get(page.file.src_uri, 1.0)}
    if page.file.generated_by:
        return markdown
    return bent(markdown, page.file.src_uri, joined_files())


def on_nav(nav: Navigation, **_: Any) -> None:
    _pages[:] = nav.pages


_pages: list[Page] = []


def summary(markdown: str) -> str:
    """Returns the first sentence below a page's title, without links.

    >>> summary("# Title\\n\\n`step` of [ours](a.md) is short: it is. More follows.")
    '`step` of ours is short: it is.'
    """
    _, first, *_ = *re.split(r"\n\s*\n", markdown.strip()), ""
    text = " ".join(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", first).split())
    return "" if text.startswith("#") else re.split(r"(?<=[.?!]) ", text)[0]


def on_post_build(config: MkDocsConfig) -> None:
    """Writes `llms.txt`, a list of the pages for machine readers, and `llms-full.txt` with the text of all of them."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}.", ""]
    texts = []
    for page in _pages:
        markdown = page.markdown or ""
        lines.append(f"- [{page.title}]({page.url}): {summary(markdown)}".removesuffix(": "))
        texts.append(f"<!-- {page.url} -->\n\n{markdown.strip()}\n")
    site = Path(config.site_dir)
    (site / "llms.txt").write_text("\n".join(lines) + "\n")
    (site / "llms-full.txt").write_text("\n\n".join(texts))
