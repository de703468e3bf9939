"""Links of the documents lead somewhere; the site's navigation has every page; files that are named are there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml
from docs.documents import PAGES, ROOT, anchors, inline, slug

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
_ELSEWHERE = ("http://", "https://", "mailto:")


def targets(page: Path) -> list[str]:
    """What its links and images lead to."""
    found = [token.attrGet("href" if token.type == "link_open" else "src") for token in inline(page)]
    return [str(target) for target in found if target]


@EVERY_PAGE
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for target in targets(page):
        if target.startswith(_ELSEWHERE):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        found = there.exists() and there.is_relative_to(ROOT)
        if not found or (anchor and (there.suffix != ".md" or anchor not in anchors(there))):
            broken.append(target)
    assert not broken


def test_a_heading_is_linked_as_github_does() -> None:
    assert slug("Deadlines: `--deadline`, `--shed`".replace("`", "")) == "deadlines---deadline---shed"
    assert slug("POST /v1/chat/completions") == "post-v1chatcompletions"
    assert "deadlines---deadline---shed" in anchors(ROOT / "docs" / "scheduling.md")


class _Loader(yaml.SafeLoader):
    """Of mkdocs.yml, whose own tags are passed over."""


_Loader.add_multi_constructor("", lambda _loader, _tag, _node: None)


def test_the_site_has_every_page_once() -> None:
    listed = re.findall(r"[\w/-]+\.md", str(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"]))
    pages = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(listed) == pages


def test_the_overview_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    missing = {path.name for path in index.parent.glob("*.md")} - set(targets(index)) - {index.name}
    assert not missing


def expanded(name: str) -> list[str]:
    """``a/{b,c}.py`` as a shell would have it."""
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


@pytest.mark.parametrize("name", ["architecture.md", "adding-a-family.md"])
def test_the_code_is_where_the_page_says(name: str) -> None:
    page = ROOT / "docs" / name
    missing = []
    for token in inline(page):
        if token.type != "code_inline" or not re.fullmatch(r"[\w{},./*-]+/[\w{},./*-]*", token.content):
            continue
        for path in expanded(token.content):
            roots = (ROOT, ROOT / "llmctl", ROOT / "llmctl" / "targets" / "cpu", ROOT / "llmctl" / "targets" / "cuda")
            if not any(list(root.glob(path.rstrip("/"))) for root in roots):
                missing.append(path)
    assert not missing


@EVERY_PAGE
def test_files_that_are_named_are_there(page: Path) -> None:
    named = [word for t in inline(page) if t.type == "code_inline" for word in t.content.split()]
    paths = [path for word in named if re.match(r"(scripts|docs|configs|tests)/", word) for path in expanded(word)]
    written_by_readers = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    found = [path.rstrip("/.,;") for path in paths]
    assert [path for path in found if path not in written_by_readers and not list(ROOT.glob(path))] == []


def texts_of_the_code() -> str:
    """The sources, string literals that follow each other joined."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "llmctl").rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))


def test_messages_that_are_quoted_are_the_codes() -> None:
    """What troubleshooting.md says one sees: each part between ellipses, if it is longer than a word or two."""
    said, missing = texts_of_the_code(), []
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        if line.startswith("| ") and "`" in line.split("|")[1]:
            quoted = re.findall("`([^`]+)`", line.split("|")[1])
            parts = [part.strip() for text in quoted for part in text.split("…")]
            missing += [part for part in parts if len(part) > 15 and not part.startswith("<|") and part not in said]
    assert not missing
