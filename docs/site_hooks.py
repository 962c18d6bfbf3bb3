"""What mkdocs.yml cannot say: files of the repository outside of docs/ that are pages of the site, too.

Pages link to them as they lie in the repository (`../CHANGELOG.md`), so that the links work there as well.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]


def outside_pages() -> dict[str, str]:
    """Where a file of the repository lies in the site: its path from the root, and its place in the site."""
    folder = ROOT / "benchmarks" / "results"
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".svg"))
    results = [path.relative_to(folder).as_posix() for path in found]
    return {"CHANGELOG.md": "changelog.md"} | {f"benchmarks/results/{name}": f"results/{name}" for name in results}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, place in outside_pages().items():
        level = InclusionLevel.NOT_IN_NAV if place.startswith("results/") else InclusionLevel.UNDEFINED
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text, inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ go to the pages that these files are in the site."""
    up = "../" * page.file.src_uri.count("/")
    for source, place in outside_pages().items():
        markdown = re.sub(rf"\]\({re.escape(up)}\.\./{re.escape(source)}(?=[)#])", f"]({up}{place}", markdown)
    return markdown
