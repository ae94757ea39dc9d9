"""A hook of mkdocs: pages that lie outside `docs/`, the README first, are part of the site, and links lead to them.

A file of the repository keeps its path on the site, without `docs/`; README.md is the index.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#\s]+)(?P<place>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and every file outside `docs/` that it, a page, or what was added links to."""
    from mkdocs.structure.files import File, InclusionLevel

    seen, waiting = set[str](), ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            added = File.generated(config, _on_site(path), abs_src_path=str(ROOT / path))
            added.inclusion = InclusionLevel.INCLUDED if path == "README.md" else InclusionLevel.NOT_IN_NAV
            files.append(added)
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [target for link in _LINK.finditer(text) if (target := _in_repository(link["target"], path))]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site; a folder has no page."""
    here = page.file.src_uri
    source = str(Path(str(page.file.abs_src_path)).relative_to(ROOT))

    def rewritten(link: re.Match[str]) -> str:
        if target := _in_repository(link["target"], source):
            return f"{link['text']}({relpath(_on_site(target), str(Path(here).parent))}{link['place'] or ''})"
        return link["text"][1:-1] if (ROOT / source / ".." / link["target"]).is_dir() else link[0]

    return _LINK.sub(rewritten, markdown)


def _in_repository(target: str, source: str) -> str | None:
    """The file, by its path in the repository, that a link in a file means; None for addresses and folders."""
    path = normpath(str(Path(source).parent / target))
    return path if "://" not in target and not path.startswith("..") and (ROOT / path).is_file() else None


def _on_site(path: str) -> str:
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
