"""The site builds without a warning, its links lead somewhere, and a browser has nothing to complain of."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from helpers import browser

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the site, built anew."""
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: run `make docs` once, or pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


class Links(HTMLParser):
    """What a page points to, and the names in it that can be pointed to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value and not value.startswith(("data:", "javascript:")):
                self.targets.append(value)
            if name == "id" and value:
                self.names.add(value)


def pages(folder):
    return {str(path.relative_to(folder)): Links(path.read_text()) for path in sorted(folder.rglob("*.html"))}


def broken(folder):
    """Returns every link of a page to a file or to a name in a page that is not there."""
    found, everything = [], pages(folder)
    for address, page in everything.items():
        for target in page.targets:
            there = urlsplit(urljoin(f"http://site/{address}", target))
            path = unquote(there.path).lstrip("/") or "index.html"
            if there.netloc != "site" or (address == "404.html" and target.startswith("/")):
                continue
            if not (folder / path).is_file():
                found.append(f"{address}: {target} is not there")
            elif there.fragment and path in everything and unquote(there.fragment) not in everything[path].names:
                found.append(f"{address}: {target} has no such name")
    return found


def test_every_internal_link_leads_somewhere(built):
    assert len(pages(built)) > 40
    assert broken(built) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a> <a href="c.html">c</a> <a href="#there">a</a>')
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1> <img src="a.html"> <a href="https://example.com/">e</a>')
    assert broken(tmp_path) == [
        "a.html: b.html#here has no such name",
        "a.html: c.html is not there",
        "a.html: #there has no such name",
    ]


def test_nothing_is_fetched_from_elsewhere(built):
    for path in built.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)"', path.read_text()
        )
        assert loaded == [], path.name


def test_machine_readers_find_every_page(built):
    listed = re.findall(r"\]\(([^)]*)\)", (built / "llms.txt").read_text())
    assert {"index.html", "errors.html", "low-precision.html", "training/cuda-graphs.html"} <= set(listed)
    assert all((built / address).is_file() for address in listed)
    assert len((built / "llms-full.txt").read_text()) > 50_000


@pytest.fixture
def served(built):
    """The address of a server of the site."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


NEEDS_BROWSER = pytest.mark.skipif(
    browser.installed() is None, reason=f"no browser is installed: none of {', '.join(browser.NAMES)} is on the PATH"
)


@NEEDS_BROWSER
def test_no_page_complains_or_is_wider_than_a_phone(built, served):
    """Every page, on a desktop by day, then as a phone in the dark."""
    wide = []
    with browser.Browser() as tab:
        for address in set(pages(built)) - {"404.html"}:  # which asks for its files at the root of a domain
            for width, height, dark in [(1280, 900, False), (390, 844, True)]:
                tab.resize(width, height, dark)
                if not dark:
                    tab.open(f"{served}/{address}")
                if tab.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
                    wide.append(f"{address} at {width}")
            assert tab.evaluate("document.querySelector('h1') !== null"), address
        assert tab.complaints == []
    assert wide == []


@NEEDS_BROWSER
def test_what_a_page_complains_of_is_seen(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<h1>bad</h1><img src='none.png'><script>console.error('oh'); nothing()</script>"
    )
    with browser.Browser() as tab:
        tab.open((tmp_path / "bad.html").as_uri())
    said = "\n".join(tab.complaints)
    assert "oh" in said and "nothing is not defined" in said and "could not load a Image" in said


QUESTIONS = {
    "clip gradients": "training/clipping.html",
    "bfloat16 weights memory": "low-precision.html",
    "load checkpoint of torch.optim.AdamW": "training/plain.html",
    "capture a step in a CUDA graph": "training/cuda-graphs.html",
    "got a second gradient before step": "errors.html",
    "FSDP2 all-reduces": "sharding.html",
    "differs from the original Adafactor": "adafactor.html",
    "exclude LayerNorm and bias from weight decay": "api/helpers.html",
    "token weighted accumulation": "training/accumulation.html",
    "did the run use these rates": "schedules.html",
}
"""What a new user types into the search, and the page that has the answer."""

SEARCH = """new Promise(done => {
    const input = document.querySelector("[data-md-component=search-query]")
    input.focus()
    input.value = QUERY
    input.dispatchEvent(new Event("input", {bubbles: true}))
    input.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}))
    const end = Date.now() + 20000
    const look = () => {
        const found = [...document.querySelectorAll(".md-search-result__item > .md-search-result__link")]
        const links = found.map(link => new URL(link.href).pathname)
        links.length || Date.now() > end ? done(links) : setTimeout(look, 100)
    }
    look()
})"""


@NEEDS_BROWSER
def test_the_search_answers_ten_questions_among_its_first_five_pages(served):
    missed = {}
    with browser.Browser() as tab:
        tab.resize(1280, 900)
        for question, page in QUESTIONS.items():
            tab.open(f"{served}/index.html")
            found = list(dict.fromkeys(tab.evaluate(SEARCH.replace("QUERY", json.dumps(question)))))
            if f"/{page}" not in found[:5]:
                missed[question] = found[:5]
    assert missed == {}
