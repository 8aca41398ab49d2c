"""MkDocs hook: the pages of the repository's root, and links to files that are not part of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=_with_links_of_site(text, "")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return markdown if page.file.src_uri in PAGES.values() else _with_links_of_site(markdown, "docs")


def _with_links_of_site(markdown: str, folder: str) -> str:
    """Links of a file in `folder` of the repository as the site has them.

    Pages of the site link to each other. The site has no other files of the repository: those become their paths.
    """

    def replace(link: re.Match[str]) -> str:
        image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            return f"{image}[{text}]({PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"{image}[{text}]({path.removeprefix('docs/')}{anchor})"
        name = f"`{path}`"
        return name if text.strip("`") == path else f"{text} ({name})"

    return _LINK.sub(replace, markdown)
