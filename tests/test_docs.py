"""The pages: links lead somewhere, each page can be found, and what they show of the command line is what it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks/results").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")

HREF = re.compile(r'(?:href|src)="(?!\w+:|/|#)([^"]*)"')


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def outputs(page: Path) -> dict[str, str]:
    """Command -> what a page shows of its output, of blocks that begin with `$ qlora`."""
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    shown = [block[2:].partition("\n") for block in blocks if block.startswith("$ qlora")]
    return {command: output for command, _, output in shown}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / link["path"] if link["path"] else page
        assert target.exists(), f"{page.name} links to {link['path']}, which is not there"
        if link["anchor"]:
            assert link["anchor"] in anchors(target), f"{page.name} links to {link[0]}"


def test_every_page_can_be_found():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    for start in (ROOT / "README.md", ROOT / "docs" / "index.md"):  # of the repository, of the site
        linked = {Path(link["path"]).name for link in LINK.finditer(start.read_text(encoding="utf-8"))}
        assert pages - {"index.md"} <= linked
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert {page for entry in entries for page in entry.values()} == pages


def test_the_sites_links_lead_somewhere(tmp_path):
    """Those too that lead out of docs/, and those of the README and the records' pages."""
    pytest.importorskip("mkdocs", reason="part of the [docs] extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {page.parent: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    links = {(folder / href.partition("#")[0]) for folder, text in pages.items() for href in HREF.findall(text)}
    assert not [link for link in links if not link.exists()]
    assert any(link.name.endswith(".csv") for link in links)


def test_the_commands_are_those_of_the_page(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert f"```\n{capsys.readouterr().out.strip()}\n```" in (ROOT / "docs/cli.md").read_text(encoding="utf-8")


def test_the_plan_is_that_of_the_page(capsys):
    assert cli.main(["plan"]) == 0
    assert capsys.readouterr().out.strip() == outputs(ROOT / "docs/cli.md")["qlora plan"].strip()
