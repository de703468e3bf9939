"""The page in a real browser: chats, what models write, the views.

pip install -e '.[browser]'; apt-get install chromium; pytest -m slow -k chromium tests/e2e
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures import ServerProcess
from page_in_chromium import IN_CHROMIUM, Page, answers_with, browser, new_page, say, served, setting, wait_answer

__all__ = ["browser", "new_page", "served"]  # fixtures
pytestmark = IN_CHROMIUM
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
def keyed(tiny_engine: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--model", str(tiny_engine), "--api-key", KEY) as server:
        server.wait_ready()
        yield server


def never_ends(page: Page) -> None:
    """Chats are answered, from now on, with what ``window.emit(TEXT)`` is given; ``window.aborted`` counts the ends."""
    page.evaluate(
        """() => {
          const real = window.fetch;
          const bytes = new TextEncoder();
          window.aborted = 0;
          window.fetch = async (url, options) => {
            if (!String(url).endsWith('/v1/chat/completions')) return real(url, options);
            const body = new ReadableStream({
              start(stream) {
                window.emit = (content) => {
                  const event = { choices: [{ index: 0, delta: { content }, finish_reason: null }] };
                  stream.enqueue(bytes.encode(`data: ${JSON.stringify(event)}\\n\\n`));
                };
                options.signal.addEventListener('abort', () => {
                  window.aborted += 1;
                  stream.error(options.signal.reason);
                });
              },
            });
            return new Response(body, { headers: { 'Content-Type': 'text/event-stream' } });
          };
        }"""
    )


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
    page.get_by_label("Message", exact=True).wait_for()
    never_ends(page)
    say(page, "first")
    page.get_by_text("Waiting for the first token").wait_for()
    page.keyboard.press("Escape")
    assert wait_answer(page) == ""
    assert page.locator(".stats").last.inner_text() == "ended before the first token: stopped"
    say(page, "second")
    page.evaluate("window.emit('half an')")
    page.get_by_text("half an", exact=True).wait_for()
    assert page.evaluate("window.aborted") == 1
    page.keyboard.press("Escape")
    assert wait_answer(page) == "half an"
    assert "ended: stopped" in page.locator(".stats").last.inner_text()
    assert page.evaluate("window.aborted") == 2


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(
    served: ServerProcess, new_page: Callable[..., Page]
) -> None:
    page = new_page(served.url)
    page.get_by_label("Message", exact=True).wait_for()
    never_ends(page)
    say(page, "a secret")
    page.evaluate("window.emit('half an')")
    page.get_by_text("half an", exact=True).wait_for()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete a secret").click()
    page.wait_for_function("() => window.aborted === 1")
    page.wait_for_timeout(100)
    assert page.evaluate("Object.keys(localStorage)") == []
    assert page.get_by_role("button", name="Delete a secret").count() == 0
    page.reload()
    page.get_by_label("Message", exact=True).wait_for()
    assert page.get_by_role("button", name="a secret").count() == 0


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


def test_requests_of_other_keys_are_counted_and_not_listed(
    served: ServerProcess, new_page: Callable[..., Page]
) -> None:
    page = new_page(served.url + "/#live")
    page.evaluate(
        """() => {
          const real = window.fetch;
          const found = JSON.stringify({running: 2, queued: 1, requests: []});
          window.fetch = async (url, options) => String(url).endsWith('requests')
            ? new Response(found, {headers: {'Content-Type': 'application/json'}}) : real(url, options);
        }"""
    )
    page.get_by_text("2 running, 1 queued; 0 of them shown").wait_for()
    page.get_by_text("None of them is of this key.").wait_for()


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
