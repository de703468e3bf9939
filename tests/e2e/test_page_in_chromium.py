"""The page in a real browser: Debian's ``chromium``, or what CHROMIUM names, driven by Playwright.

pip install -e '.[browser]'; apt-get install chromium; pytest -m slow tests/e2e/test_page_in_chromium.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import LOOP_TEXT, ServerProcess, share_compiled_kernels

playwright_api = pytest.importorskip("playwright.sync_api", reason="Playwright: pip install -e '.[browser]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, or set CHROMIUM"),
    pytest.mark.xdist_group("chromium"),
]
Page = Any
KEY = "the-key"
VIEWS = ("chat", "live", "engine", "api")
HOSTILE = """# Title <img src=x onerror="window.hit = 1">

<script>window.hit = 1</script> **bold** `code <b>` and [bad](javascript:window.hit=1) [good](https://example.org/a?b=1&c)

![picture](https://example.org/p.png)

| a | b |
|---|---|
| <i>1</i> | 2 |

1. one
   - two
2. three

```html
<iframe src="https://example.org"></iframe>
```
"""


@pytest.fixture(scope="module")
def served(tiny_engine: Path) -> Iterator[ServerProcess]:
    """A server without keys."""
    with ServerProcess("--model", str(tiny_engine), "--max-num-seqs", "16") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def keyed(tiny_engine: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--model", str(tiny_engine), "--api-key", KEY) as server:
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
    assert complaints == []


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


def test_a_chat_with_nothing_but_the_keyboard(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url)
    page.get_by_label("Message", exact=True).wait_for()
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    setting(page, "max_tokens").fill("12")
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    assert wait_answer(page)
    assert "12 tokens" in page.locator(".stats").last.inner_text()
    assert page.locator(".message.user .body").inner_text() == "hello\nthere"
    page.locator("nav a").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Live"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Live").wait_for()
    assert page.locator("nav [aria-current]").inner_text() == "Live"


def test_an_answer_is_stopped(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url)
    setting(page, "max_tokens").fill("400")
    setting(page, "temperature").fill("0")
    say(page, "é")
    page.locator(".message.assistant .body").filter(has_text=re.compile(r"\S")).wait_for()
    page.keyboard.press("Escape")
    wait_answer(page)
    said = page.locator(".stats").last.inner_text()
    assert "ended: stopped" in said or "ended: length" in said
    served.wait_load(0)


def test_what_a_model_writes_is_text(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url)
    page.get_by_label("Message", exact=True).wait_for()
    answers_with(page, [{"role": "assistant", "content": ""}, *({"content": c} for c in HOSTILE)])
    say(page, "<b>hello</b>")
    said = wait_answer(page)
    assert page.evaluate("window.hit") is None
    assert page.locator(".log :is(img, script, iframe, i, b)").count() == 0
    for text in ('<img src=x onerror="window.hit = 1">', "<script>window.hit = 1</script>", "<iframe src=", "code <b>"):
        assert text in said
    assert "[bad](javascript:window.hit=1)" in said
    links = page.locator(".log a")
    assert {link.get_attribute("href") for link in links.all()} == {
        "https://example.org/a?b=1&c",
        "https://example.org/p.png",
    }
    assert all("noopener" in link.get_attribute("rel") for link in links.all())
    assert page.locator(".log :is(h3, strong, table, ol ul, pre code)").count() == 5
    assert page.locator(".message.user .body").inner_text() == "<b>hello</b>"


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("a **b** c_d_e _f_ ***g***", "<p>a <strong>b</strong> c_d_e <em>f</em> <strong><em>g</em></strong></p>"),
        ("2 * 3 ** 4 \\*x\\*", "<p>2 * 3 ** 4 *x*</p>"),
        ("`` a`b `` ~~c~~", "<p><code>a`b</code> <del>c</del></p>"),
        (
            "1. one\n   - two\n   - three\n2. four\n\nend",
            "<ol><li>one<ul><li>two</li><li>three</li></ul></li><li>four</li></ol><p>end</p>",
        ),
        ("- a\n\n- b\n  more", "<ul><li>a</li><li>b<br>more</li></ul>"),
        ("3. a", '<ol start="3"><li>a</li></ol>'),
        ("> q\n> - r", "<blockquote><p>q</p><ul><li>r</li></ul></blockquote>"),
        ("```py\na < b\n", '<pre tabindex="0" data-language="py"><code>a &lt; b\n</code></pre>'),
        ("a\n---\n# b #", "<p>a</p><hr><h3>b</h3>"),
        ("[a](mailto:b@c.d) <u>", "<p>[a](mailto:b@c.d) &lt;u&gt;</p>"),
        (">" * 5000, None),
        ("[" * 5000 + "**_`" * 5000, None),
    ],
)
def test_markdown(served: ServerProcess, new_page: Callable[..., Page], text: str, markup: str | None) -> None:
    page = new_page(served.url)
    made = page.evaluate(
        """async (text) => {
          const place = document.createElement('div');
          place.append(...(await import('/ui/markdown.js')).markdown(text));
          return place.innerHTML;
        }""",
        text,
    )
    assert made == markup or (markup is None and made)


def test_figures_are_those_of_prometheus(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url)
    found = page.evaluate(
        """async () => {
          const { History, parse, quantile } = await import('/ui/metrics.js');
          const at = (running, tokens, low, all) => parse(`# HELP x\nvllm:num_requests_running{a="}b "} ${running}
vllm:generation_tokens_total{a="b"} ${tokens}
vllm:generation_tokens_total{a="c"} 1
vllm:time_to_first_token_seconds_bucket{a="b",le="0.1"} ${low}
vllm:time_to_first_token_seconds_bucket{a="b",le="0.5"} ${all}
vllm:time_to_first_token_seconds_bucket{le="+Inf",a="b"} ${all}`);
          const history = new History();
          history.add(100, at(1, 0, 0, 0));
          history.add(105, at(2, 50, 4, 8));
          history.add(110, at(2, 20, 4, 8));
          const buckets = new Map([[1, 10], [2, 10], [Infinity, 20]]);
          return { points: history.points, over: quantile(0.95, undefined, buckets) };
        }"""
    )
    first, second, third = found["points"]
    assert (first["running"], first["output"], first["ttft50"]) == (1, None, None)
    assert (second["running"], second["output"]) == (2, 10)
    assert second["ttft50"] == pytest.approx(0.1)  # half of eight are at or below it
    assert second["ttft95"] == pytest.approx(0.1 + 0.4 * (0.95 * 8 - 4) / 4)
    assert third["output"] is None  # a counter that fell is another worker's
    assert found["over"] == 2  # beyond the last edge, that edge, as Prometheus says


def test_reasoning_is_shown_apart_and_tools_are_answered(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url)
    page.get_by_label("Message", exact=True).wait_for()
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    pieces = [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]} for text in ('{"city": ', '"Oslo"}')]
    reasoning = [{"reasoning_content": "They ask "}, {"reasoning_content": "for weather."}]
    asked = answers_with(page, [*reasoning, {"tool_calls": [call]}, *pieces], "tool_calls")
    page.locator("summary", has_text="Tools").click()
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    setting(page, "tools").fill(json.dumps(tools))
    setting(page, "use_tools").check()
    say(page, "weather?")
    wait_answer(page)
    assert asked[0]["tools"] == tools
    assert page.locator("details.reasoning .plain").text_content() == "They ask for weather."
    assert json.loads(page.locator(".call pre").inner_text()) == {"city": "Oslo"}
    answers_with(page, [{"content": "Rain."}])
    page.get_by_label("Result of get_weather").fill("rain")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Send results").click()
    sent = request.value.post_data_json["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert sent[2] == {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    page.get_by_text("Rain.").wait_for()


def test_a_model_without_a_chat_template_continues_a_text(
    tiny_llama: Path, tmp_path: Path, new_page: Callable[..., Page]
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    environment = {"LLMCTL_CACHE": str(share_compiled_kernels(tmp_path / "cache"))}
    with ServerProcess("--model", str(model), "--target", "reference", env=environment) as server:
        server.wait_ready()
        page = new_page(server.url)
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


def test_a_schema_is_kept_to_and_tokens_are_shaded(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url)
    page.locator("summary", has_text="JSON schema").click()
    setting(page, "schema").fill('{"enum": ["yes", "no"]')
    setting(page, "use_schema").check()
    say(page, "well?")
    page.get_by_text("The JSON schema is not JSON").wait_for()
    page.get_by_role("button", name="Edit").click()
    setting(page, "schema").fill('{"enum": ["yes", "no"]}')
    setting(page, "logprobs").check()
    page.get_by_label("Message", exact=True).fill("well?")
    page.keyboard.press("Enter")
    wait_answer(page)
    tokens = page.locator(".tokens")
    assert json.loads(tokens.inner_text()) in ("yes", "no")
    tokens.focus()
    page.keyboard.press("ArrowRight")
    assert re.search(r"\d %", page.locator(".detail b + *, .detail").first.inner_text())
    assert page.locator(".detail li").count() >= 1


def test_conversations_stay_and_the_key_does_not(keyed: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(keyed.url, expected="401")
    dialog = page.get_by_role("dialog", name="API key")
    dialog.wait_for()
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("The server does not know this key.").wait_for()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    setting(page, "max_tokens").fill("4")
    say(page, "remember me")
    wait_answer(page)
    for view in (*VIEWS, "chat"):
        page.locator(f"nav a[href='#{view}']").click()
        page.wait_for_timeout(200)
    assert not dialog.is_visible()
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "remember me" in stored
    assert KEY not in stored
    page.reload()
    dialog.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Enter the key").click()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    page.locator(".message.user", has_text="remember me").wait_for()
    assert setting(page, "max_tokens").input_value() == "4"
    page.get_by_role("button", name="Delete remember me").click()  # Playwright's answer to a question is no
    assert page.evaluate("Object.keys(localStorage).length") == 1
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete remember me").click()
    assert page.evaluate("Object.keys(localStorage).length") == 0


def test_the_engine_at_work_and_a_hidden_page(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url + "/#live")
    page.get_by_role("heading", name="Live").wait_for()
    page.get_by_text("No requests are being served.").wait_for()
    assert page.locator("figure.chart").count() == 6
    page.evaluate(
        """() => {
          const again = () => window.enough ? window.done = true : fetch('v1/completions', {
            method: 'POST',
            headers: {'Content-Type': 'application/json', 'X-Request-Id': 'watched'},
            body: JSON.stringify({prompt: 'é', n: 8, max_tokens: 480, ignore_eos: true}),
          }).then(again);
          again();
        }"""
    )
    page.locator("tr", has_text="watched").first.wait_for()
    page.evaluate("window.enough = true")
    page.wait_for_function("() => window.done")
    page.wait_for_timeout(11_000)  # two readings of the metrics after it
    assert (
        page.locator("figure.chart", has_text="Tokens per second").locator("path.line.one").get_attribute("d") != "M0 0"
    )
    assert "–" not in page.locator("figure.chart", has_text="Requests").locator("figcaption").inner_text()
    asked: list[str] = []
    page.evaluate(
        """Object.defineProperty(document, 'hidden', {configurable: true, get: () => true});
           document.dispatchEvent(new Event('visibilitychange'))"""
    )
    page.wait_for_timeout(1_000)
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(6_000)
    assert asked == []
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(1_000)
    assert {url.rpartition("/")[2] for url in asked} == {"metrics", "requests", "ready"}


def test_the_engines_card(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url + "/#engine")
    page.get_by_role("heading", name="Memory").wait_for()
    text = page.locator("main").inner_text()
    for word in (
        "tiny-llama",
        "llama, 2 layers",
        "not quantized",
        "KV cache",
        "budget",
        "after the layers",
        "attention",
    ):
        assert word in text


def test_layers_that_are_alike_are_shown_once(served: ServerProcess, new_page: Callable[..., Page]) -> None:
    page = new_page(served.url)
    ops = [{"layer": layer, "kind": kind, "kernel": "k"} for layer in range(-1, 5) for kind in ("a", "bc"[layer < 1])]
    made = page.evaluate("async (ops) => (await import('/ui/engine.js')).stages(ops)", ops)
    assert [stage["layers"] for stage in made] == [[-1, -1], [0, 0], [1, 4]]
    assert [op["kind"] for op in made[-1]["ops"]] == ["a", "b"]


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


def test_the_prompt_and_the_exports(served: ServerProcess, new_page: Callable[..., Page], tmp_path: Path) -> None:
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

    def copied(name: str) -> str:
        page.get_by_role("button", name=name, exact=True).click()
        page.get_by_role("button", name="Copied").wait_for()
        page.wait_for_timeout(1_600)
        return str(page.evaluate("navigator.clipboard.readText()"))

    answer = subprocess.run(["bash", "-c", copied("curl")], capture_output=True, text=True, timeout=60, check=True)
    assert "data: [DONE]" in answer.stdout
    program = tmp_path / "asked.py"
    program.write_text(copied("Python"))
    assert "extra_body" in program.read_text()
    subprocess.run([shutil.which("python3") or "python3", "-m", "py_compile", str(program)], check=True, timeout=60)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_its_window(served: ServerProcess, new_page: Callable[..., Page], width: int, scheme: str) -> None:
    page = new_page(served.url, viewport={"width": width, "height": 740}, color_scheme=scheme)
    page.get_by_label("Message", exact=True).wait_for()
    for view in VIEWS:
        page.locator(f"nav a[href='#{view}']").click()
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        assert page.evaluate("document.querySelector('main').scrollWidth") <= width, view
    page.locator("nav a[href='#chat']").click()
    if width == 375:
        page.get_by_role("button", name="Settings").click()
        setting(page, "temperature").wait_for()
        assert not page.get_by_label("Message", exact=True).is_visible()
        page.get_by_role("button", name="Settings").click()
    page.get_by_label("Message", exact=True).wait_for()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
