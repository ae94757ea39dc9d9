"""The documentation as a site: it builds without a warning, has every page, and asks no other host for anything."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that does not tell of each."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


def _pages(entries: list[object]) -> list[str]:
    """The files that a nav names, at any depth."""
    values = [value for entry in entries for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [page for value in values for page in (_pages(value) if isinstance(value, list) else [str(value)])]


def test_every_page_of_the_documentation_is_in_the_nav() -> None:
    nav = _pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(nav) == sorted({*pages, "index.md"}), "add the page to `nav` in mkdocs.yml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return folder


def test_the_readme_is_the_index_and_its_links_lead_to_pages(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"# (.+)", (ROOT / "README.md").read_text(encoding="utf-8"))[0] in index
    assert 'href="docs/' not in index
    targets = [link.partition("#")[0] for link in re.findall(r'(?:href|src)="([^"]+)', index) if "://" not in link]
    assert [target for target in targets if not (site / target).exists()] == []
    assert (site / "recipes" / "xlora.yaml").is_file()  # a page links to it


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(https?://[^"]+)"', path.read_text(encoding="utf-8")
        )
        assert loaded == [], path.name
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_the_search_finds_a_page_with_nothing_but_the_site(site: Path, open_page: Callable[..., Page]) -> None:
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        page = open_page(f"{address}/index.html", lambda url: url.startswith(address))
        page.get_by_role("textbox", name="Search").fill("renderings.json")
        page.locator(".md-search-result__item").first.wait_for()
        assert "renderings.json" in page.locator(".md-search-result__list").inner_text()
        server.shutdown()
