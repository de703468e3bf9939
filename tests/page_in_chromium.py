"""For tests of the page in a real browser: Debian's ``chromium``, or what CHROMIUM names, driven by Playwright."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import ServerProcess

playwright_api = pytest.importorskip("playwright.sync_api", reason="Playwright: pip install -e '.[browser]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
IN_CHROMIUM = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, or set CHROMIUM"),
    pytest.mark.xdist_group("chromium"),
]
Page = Any


@pytest.fixture(scope="module")
def served(tiny_engine: Path) -> Iterator[ServerProcess]:
    """A server without keys."""
    with ServerProcess("--model", str(tiny_engine), "--max-num-seqs", "16") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """Makes pages in contexts of their own. What any of them complains of, or asks of another host, fails the test."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def made(url: str, *, expected: str = "$^", **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: (
                complaints.append(said.text)
                if said.type in ("error", "warning") and not re.search(expected, said.text)
                else None
            ),
        )
        here = "/".join(url.split("/")[:3]) + "/"
        page.on("request", lambda request: None if request.url.startswith(here) else complaints.append(request.url))
        page.goto(url)
        return page

    yield made
    for context in contexts:
        context.close()
    if complaints:
        pytest.fail("\n".join(complaints))


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def wait_answer(page: Page) -> str:
    """The last answer once it is whole."""
    page.locator(".message.assistant .stats:not(:empty)").last.wait_for()
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    return str(page.locator(".message.assistant .body").last.inner_text())


def setting(page: Page, name: str) -> Any:
    return page.locator(f"[data-setting={name}]")


def answers_with(page: Page, deltas: list[dict[str, Any]], reason: str = "stop") -> list[dict[str, Any]]:
    """Chats are answered with these from now on. What was asked is kept in the list that comes back."""
    asked: list[dict[str, Any]] = []

    def fulfil(route: Any) -> None:
        asked.append(route.request.post_data_json)
        usage = {"prompt_tokens": 1, "completion_tokens": len(deltas), "total_tokens": 1}
        events: list[Any] = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
        events[-1]["choices"][0]["finish_reason"] = reason
        events.append({"choices": [], "usage": usage})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        route.fulfill(
            status=200, headers={"Content-Type": "text/event-stream"}, body=": keep-alive\n\n" + "".join(lines)
        )

    page.route("**/v1/chat/completions", fulfil)
    return asked
