"""A hook of mkdocs: the pages link to files outside of docs/ by their places in the repository, and so does the README.

Every file that a page links to comes into the site, under repository/; of a folder all of its files, behind a page that
lists them.  The links are turned to there, so that the same text leads somewhere here and on a hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?P<path>[^)#\s]+)")


def on_files(files: Files, config: Any) -> None:
    """Add what the pages link to, and what those link to."""
    pages = [ROOT / "docs" / page.src_uri for page in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for link in LINK.finditer(page.read_text(encoding="utf-8")):
            target = (page.parent / link["path"]).resolve()
            added = sorted(target.iterdir()) if target.is_dir() else [target]
            if target.is_dir() and files.get_file_from_path(_place(target)) is None:
                files.append(_listing(target, added, config))
            for path in added:
                if path.is_file() and files.get_file_from_path(_place(path)) is None:
                    files.append(File.generated(config, _place(path), abs_src_path=str(path)))
                    pages += [path] if path.suffix == ".md" else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The links of a page, led to their files' places in the site."""
    place = page.file.src_uri
    source = ROOT / (place.removeprefix("repository/") if place.startswith("repository/") else f"docs/{place}")

    def there(link: re.Match[str]) -> str:
        return os.path.relpath(_place((source.parent / link["path"]).resolve()), os.path.dirname(place) or ".")

    return LINK.sub(there, markdown) if source.is_file() else markdown  # and not the list of a folder


def _listing(folder: Path, paths: list[Path], config: Any) -> File:
    names = "\n".join(f"- [{path.name}]({path.name})" for path in paths if path.is_file())
    return File.generated(config, _place(folder), content=f"# {folder.relative_to(ROOT)}\n\n{names}\n")


def _place(path: Path) -> str:
    """Where a file of the repository is in the site; of a folder its list."""
    known = path.relative_to(ROOT).as_posix() + ("/index.md" if path.is_dir() else "")
    return known.removeprefix("docs/") if known.startswith("docs/") else f"repository/{known}"
