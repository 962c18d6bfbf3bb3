"""The Markdown of this project, taken apart: code blocks, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"(?:<!-- (?P<mark>not run|as in the README): *(?P<reason>[^>]*?) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str | None
    """The file that it is, where it is one."""
    mark: str | None
    """Why it is not run, in two words; None for one that is."""
    reason: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        values = match.groupdict()
        line = text[: match.start("language")].count("\n") + 1
        found.append(Block(page=page, line=line, **{name: values[name] for name in values}))
    return found


def examples(path: Path) -> list[Block]:
    """Commands in the comments of a file: the lines that are indented there."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"(?m)(?:^# {3,}\S.*\n)+", text):
        words = re.sub(r"(?m)^# +", "", match[0])
        if re.match(r"(?:accelerate|python|pip|sbatch) ", words):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(path, line, "bash", None, "not run", "an example", words))
    return found


def prose(page: Path) -> str:
    """A page without its code: fences, indented blocks behind an empty line, comments."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!--.*?-->", "", re.sub(r"(?m)(?<=\n\n)(?: {4}.*\n)+", "", text), flags=re.DOTALL)


def links(page: Path) -> list[str]:
    """Targets of links and pictures: those of Markdown, and the src and href of HTML."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)


def anchors(page: Path) -> set[str]:
    """Of the headings: those that both the site and a repository's viewer give a heading."""
    found = set()
    for heading in re.findall(r"(?m)^#{1,6} (.+)$", prose(page)):
        plain = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        viewer = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain.encode("ascii", "ignore").decode()).strip().lower())
        if site == viewer:
            found.add(viewer)
    return found
