"""What the page shows of its requests, in a real browser, and what others make of them: curl, Python, a base model.

See ``test_page_in_chromium.py`` for what this needs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures import LOOP_TEXT, ServerProcess, share_compiled_kernels
from page_in_chromium import IN_CHROMIUM, Page, browser, new_page, say, served, setting, wait_answer

__all__ = ["browser", "new_page", "served"]  # fixtures
pytestmark = IN_CHROMIUM


def copied(page: Page, name: str) -> str:
    """What the button of this name copies."""
    page.get_by_role("button", name=name, exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    page.wait_for_timeout(1_600)
    return str(page.evaluate("navigator.clipboard.readText()"))


def run_program(program: str, folder: Path) -> str:
    """What a Python program prints."""
    file = folder / "asked.py"
    file.write_text(program)
    ran = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_model_without_a_chat_template_continues_a_text(
    tiny_llama: Path, tmp_path: Path, new_page: Callable[..., Page]
) -> None:
    pytest.importorskip("openai")
    model = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    environment = {"LLMCTL_CACHE": str(share_compiled_kernels(tmp_path / "cache"))}
    with ServerProcess("--model", str(model), "--target", "reference", env=environment) as server:
        server.wait_ready()
        page = new_page(server.url, permissions=["clipboard-read", "clipboard-write"])
        page.get_by_text("base has no chat template: it continues your text.").wait_for()
        setting(page, "max_tokens").fill("6")
        setting(page, "temperature").fill("0")
        setting(page, "logprobs").check()
        say(page, "x é")
        first = wait_answer(page)
        assert page.locator(".tokens .token").count() == 6
        assert page.locator("[data-setting=system]").count() == 0
        with page.expect_request("**/v1/completions") as request:
            say(page, "!")
        assert request.value.post_data_json["prompt"].startswith("x é" + LOOP_TEXT[1])
        assert request.value.post_data_json["prompt"].endswith("!")
        assert first
        page.get_by_role("button", name="Prompt").click()
        page.get_by_text("tokens of 512").wait_for()
        page.get_by_role("button", name="Close").click()
        page.locator("summary", has_text="JSON schema").click()
        setting(page, "schema").fill('{"enum": ["yes", "no"]}')
        setting(page, "use_schema").check()
        assert json.loads(run_program(copied(page, "Python"), tmp_path)) in ("yes", "no")
        page.context.close()  # before its server: the page asks it for its state every few seconds


def test_the_description_offline(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url + "/docs")
    page.locator("details.operation").first.wait_for()
    described = json.loads(served.get("/openapi.json")[1])["paths"]
    assert page.locator("details.operation").count() == sum(len(item) for item in described.values())
    chat = page.locator("details.operation", has_text="/v1/chat/completions")
    chat.locator("summary").first.click()
    chat.locator("dl.schema dt", has_text="temperature").first.wait_for()
    tokenize = page.locator("details.operation", has=page.locator("code", has_text=re.compile("^/tokenize$")))
    tokenize.locator("summary").first.click()
    tokenize.get_by_role("button", name="Send").click()
    tokenize.get_by_text("200 OK").wait_for()
    assert '"max_model_len": 512' in tokenize.locator(".result pre").inner_text()
    tokenize.get_by_label("Body").fill("{no JSON")
    tokenize.get_by_role("button", name="Copy as curl").click()
    tokenize.locator(".result .error", has_text="JSON").wait_for()


def test_the_prompt_and_the_exports(served: ServerProcess, new_page: Callable[..., Page], tmp_path: Path) -> None:
    pytest.importorskip("openai")
    page = new_page(served.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Message", exact=True).fill('it\'s "quoted" $HOME é')
    setting(page, "system").fill("Be brief.")
    setting(page, "max_tokens").fill("4")
    setting(page, "top_k").fill("5")
    page.get_by_role("button", name="Prompt").click()
    page.get_by_text("tokens of 512").wait_for()
    shown = page.locator("pre.rendered").inner_text()
    assert shown.startswith('<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nit\'s "quoted" $HOME é')
    page.get_by_role("button", name="Close").click()

    answer = subprocess.run(
        ["bash", "-c", copied(page, "curl")], capture_output=True, text=True, timeout=60, check=True
    )
    assert "data: [DONE]" in answer.stdout
    setting(page, "temperature").fill("0")
    page.locator("summary", has_text="JSON schema").click()
    setting(page, "schema").fill('{"enum": ["yes", "no"]}')
    setting(page, "use_schema").check()
    program = copied(page, "Python")
    assert "extra_body" in program
    assert json.loads(run_program(program, tmp_path)) in ("yes", "no")
