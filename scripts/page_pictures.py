#!/usr/bin/env python3
"""Pictures of the page, light and dark, wide and 375 pixels, with a conversation and streams on a server of its own.

    pip install -e '.[browser]'; apt-get install chromium
    python scripts/page_pictures.py --model ./engine --output pictures

Every view is taken in every size and scheme; ``page-chat.png`` and ``page-live.png`` are those of the documents, two
pictures side by side. Options after ``--`` are the server's.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from served import Server, serving

SIZES = {"wide": (1040, 690), "narrow": (375, 690)}
GAP = 12
SCHEMES = ("light", "dark")
VIEWS = ("chat", "live", "engine", "api")
PAIRS = {"page-chat": ("chat-wide-light", "live-narrow-dark"), "page-live": ("live-wide-dark", "chat-narrow-light")}
QUESTION = "Name three planets and one fact about each, as a list."


def load(server: Server, stop: threading.Event) -> None:
    """Streams of different lengths, one after another."""
    number = 0
    while not stop.is_set():
        number += 1
        body = {
            "model": server.model,
            "prompt": "Once upon a time" * (1 + number % 7),
            "max_tokens": 40 + 37 * (number % 9),
        }
        request = urllib.request.Request(
            server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=120).read()
        time.sleep(0.4 * (number % 4))


def take(page: Any, folder: Path, name: str) -> None:
    """The picture of what the page shows."""
    page.screenshot(path=str(folder / f"{name}.png"))
    print(folder / f"{name}.png")


def visit(browser: Any, server: Server, folder: Path, seconds: float) -> None:
    """Every view in every size and scheme; the live views are open for ``seconds`` before, side by side."""
    pages = {}
    for scheme in SCHEMES:
        for size, (width, height) in SIZES.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1
            )
            pages[f"{size}-{scheme}"] = page = context.new_page()
            page.goto(server.url)
            page.get_by_label("Message", exact=True).fill(QUESTION)
            page.locator("[data-setting=max_tokens]").evaluate(
                "e => { e.value = 120; e.dispatchEvent(new Event('input')); }"
            )
            page.locator("[data-setting=temperature]").evaluate(
                "e => { e.value = 0; e.dispatchEvent(new Event('input')); }"
            )
            page.get_by_label("Message", exact=True).press("Enter")
            page.locator(".stats:not(:empty)").last.wait_for(timeout=120_000)
    time.sleep(seconds)
    for name, page in pages.items():
        for view in VIEWS:
            page.locator(f"nav a[href='#{view}']").click()
            page.wait_for_timeout(2500)
            take(page, folder, f"{view}-{name}")


def pair(browser: Any, folder: Path, name: str, pictures: tuple[str, str]) -> None:
    """Two pictures side by side."""
    data = [base64.b64encode((folder / f"{picture}.png").read_bytes()).decode() for picture in pictures]
    width = sum(width for width, _ in SIZES.values()) + GAP
    page = browser.new_page(viewport={"width": width, "height": SIZES["wide"][1]})
    images = f'<p style="margin:0 0 0 {GAP}px"></p>'.join(f'<img src="data:image/png;base64,{d}">' for d in data)
    page.set_content(f'<body style="margin:0;display:flex;background:#888">{images}</body>')
    page.wait_for_function("() => [...document.images].every((image) => image.complete)")
    take(page, folder, name)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0, help="of traffic before the pictures")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("options", nargs="*", help="of the server, after --")
    args = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no chromium: apt-get install chromium, or set CHROMIUM", file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    args.output.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with serving(args.model, args.options) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        threads = [threading.Thread(target=load, args=(server, stop)) for _ in range(args.streams)]
        for thread in threads:
            thread.start()
        try:
            visit(browser, server, args.output, args.seconds)
            for name, pictures in PAIRS.items():
                pair(browser, args.output, name, pictures)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
