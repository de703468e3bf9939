"""The Markdown of this repository that people read: its blocks of code, links and headings."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
RUN, NOT_RUN = "run", "not run"
_MARK = re.compile(r"<!-- (run|not run: .+?) -->\s*$")
_ENDS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: of its first line. language: of its fence; None: it is indented.
        mark: ``RUN``, ``NOT_RUN`` or "", by the comment just before it.
    """

    page: Path
    line: int
    language: str | None
    text: str
    mark: str

    @property
    def place(self) -> str:
        """``docs/guide.md:12``."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """What a shell would start, word by word: of ``bash``, and of the steps of a pipeline in ``yaml``."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "bash" else []
        if self.language == "yaml":
            lines = re.findall(r"^ *- run: (.+)$", self.text, re.MULTILINE)
        return [command for line in lines for command in simple_commands(line)]


def simple_commands(line: str) -> list[list[str]]:
    """The commands of one line of shell, split at ``&&``, ``|``, ``;`` and ``&``; redirections are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if word in _ENDS:
            found.append([])
        elif set(word) <= set("<>&"):
            if found[-1][-1:] in (["1"], ["2"]):  # 2>
                found[-1].pop()
            skip = True
        elif skip:
            skip = False
        else:
            found[-1].append(word)
    return [command for command in found if command]


@cache
def tokens(page: Path) -> list[Token]:
    """A page as CommonMark with tables."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> Iterator[Block]:
    """Its blocks of code, in order."""
    before = ""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            found = _MARK.search(before)
            mark = found[1].partition(":")[0] if found else ""
            language = token.info.strip() if token.type == "fence" else None
            assert token.map is not None
            yield Block(page, token.map[0] + 1, language, token.content, mark)
        before = token.content if token.type == "html_block" else ""


def all_blocks() -> list[Block]:
    """Those of every page."""
    return [block for page in PAGES for block in blocks(page)]


def inline(page: Path) -> Iterator[Token]:
    """The parts of its paragraphs, cells and headings: texts, codes, links, images."""
    for token in tokens(page):
        yield from token.children or ()


def slug(heading: str) -> str:
    """What GitHub, and the site, link a heading by."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    """The headings of a page, as links name them; the second of a name has ``-1`` behind it."""
    found: dict[str, int] = {}
    names = []
    listed = tokens(page)
    for opened, content in itertools.pairwise(listed):
        if opened.type == "heading_open":
            text = "".join(t.content for t in content.children or () if t.type in ("text", "code_inline"))
            name = slug(text)
            count = found[name] = found.get(name, -1) + 1
            names.append(f"{name}-{count}" if count else name)
    return frozenset(names)
