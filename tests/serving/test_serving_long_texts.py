"""Long inputs: refused by their size where that is enough, and worked on off the event loop where it is not."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from small_tokenizers import byte_level_backend
from starlette.requests import Request

from llmctl.engine.output import TextOutput
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import MAX_BAD_WORDS, MAX_STOP_STRINGS
from llmctl.engine.step import TokenScores
from llmctl.errors import CapacityError, QueueFullError, RequestError
from llmctl.serving import body
from llmctl.serving.completion_answer import CompletionAnswer
from llmctl.serving.context import Model
from llmctl.serving.embedding_schema import EmbeddingRequest
from llmctl.serving.generation import Generation
from llmctl.serving.intake import Intake, Prompt
from llmctl.serving.messages_api.protocol import MessagesRequest
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import (
    ApiModel,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.sampling_defaults import SamplingDefaults
from llmctl.serving.sampling_fields import MAX_TEMPLATE_BYTES, check_sampling
from llmctl.serving.text_workers import INLINE_BYTES, TextWorkers
from llmctl.serving.tgi_api.protocol import GenerateRequest
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.tokenizer import Tokenizer

CONTEXT = 1000
LONG = "fox " * INLINE_BYTES
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


class Watched(Tokenizer):
    """Keeps the thread and the size of all work."""

    def __init__(self) -> None:
        super().__init__(byte_level_backend())
        self.work: list[tuple[bool, int]] = []  # on the event loop?, bytes

    def note(self, size: int) -> None:
        self.work.append((threading.current_thread() is threading.main_thread(), size))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.note(len(text.encode()))
        return super().encode(text, add_special_tokens)

    def encode_each(self, texts: Any, add_special_tokens: bool = True) -> list[list[int]]:
        self.note(sum(len(text.encode()) for text in texts))
        return super().encode_each(texts, add_special_tokens)

    def encode_up_to(self, most: int, text: str, add_special_tokens: bool = True) -> list[int] | int:
        self.note(len(text.encode()))
        return super().encode_up_to(most, text, add_special_tokens)

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        self.note(len(ids) * 4)
        return super().decode(ids, skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        self.note(4)
        return super().id_to_token(token_id)


class WatchedTemplate(ChatTemplate):
    """A template that is work like any other."""

    def __init__(self, tokenizer: Watched, source: str = TEMPLATE) -> None:
        super().__init__(source)
        self.tokenizer = tokenizer

    def render(self, /, messages: Any, *args: Any, **kwargs: Any) -> str:
        self.tokenizer.note(len(json.dumps(messages)))
        return super().render(messages, *args, **kwargs)


@pytest.fixture
def tokenizer() -> Watched:
    return Watched()


def intake(tokenizer: Watched, context: int = CONTEXT) -> Intake:
    template = WatchedTemplate(tokenizer)
    made = Intake(tokenizer, template, max_model_len=context, vocab_size=tokenizer.vocab_size, defaults={})
    tokenizer.work.clear()  # what is asked of a template at the start: how it shows tools
    return made


def chat(content: str, count: int = 1) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}] * count}


def asked(made: Intake) -> Iterator[Callable[[], Any]]:
    """Every way to have text worked on, each with much of it."""
    few = [LONG[:2000]] * 40
    yield lambda: made.completion_prompts(CompletionRequest(prompt=LONG))
    yield lambda: made.completion_prompts(CompletionRequest(prompt=few))
    yield lambda: made.completion_prompts(CompletionRequest(prompt=[5] * 9000, echo=True))
    yield lambda: made.completion_params(CompletionRequest(prompt="x", bad_words=["a fox"] * 900))
    for content, count in ((LONG, 1), ("fox", 3000)):
        fields = chat(content, count)
        yield lambda f=fields: made.chat_prompt(ChatCompletionRequest(**f), len(json.dumps(f)))
        yield lambda f=fields: made.tokenize(TokenizeChatRequest(**f), len(json.dumps(f)))
    yield lambda: made.tokenize(TokenizeRequest(prompt=LONG), len(LONG))
    yield lambda: made.last_tokens(LONG, 3)
    yield lambda: made.token_texts([5] * 9000)
    yield lambda: made.detokenize(DetokenizeRequest(tokens=[5] * 9000))


def test_the_event_loop_works_on_a_few_kb_of_text_at_most(tokenizer: Watched) -> None:
    made = intake(tokenizer, 10**5)
    for number, ask in enumerate(asked(made)):
        tokenizer.work.clear()
        asyncio.run(ask())
        assert tokenizer.work, number
        assert sum(size for on_loop, size in tokenizer.work if on_loop) <= INLINE_BYTES, number


def test_short_texts_need_no_thread(tokenizer: Watched) -> None:
    made = intake(tokenizer)
    asyncio.run(made.completion_prompts(CompletionRequest(prompt="a fox")))
    asyncio.run(made.completion_params(CompletionRequest(prompt="x", bad_words=["fox", "dog"])))
    asyncio.run(made.chat_prompt(ChatCompletionRequest(**chat("hi")), 60))
    assert len(tokenizer.work) == 1 + 1 + 2
    assert all(on_loop for on_loop, _ in tokenizer.work)


def test_a_template_that_makes_much_of_little_is_left_to_a_thread(tokenizer: Watched) -> None:
    made = intake(tokenizer, 10**5)
    small = ChatCompletionRequest(**chat("hi"))

    def rendered(source: str) -> list[bool]:
        tokenizer.work.clear()
        made._chat_template = WatchedTemplate(tokenizer, source)
        assert asyncio.run(made.chat_prompt(small, 60)).token_ids
        return [on_loop for on_loop, _ in tokenizer.work]

    assert rendered(TEMPLATE) == [True, True]
    assert rendered("{% for i in range(3000) %}x{% endfor %}") == [
        True,
        False,
        False,
    ]  # begun, given up, done elsewhere
    made._chat_template = WatchedTemplate(tokenizer, "{{ raise_exception('no') }}")
    with pytest.raises(RequestError, match="chat template: no"):
        asyncio.run(made.chat_prompt(small, 60))
    made._chat_template = WatchedTemplate(
        tokenizer, "{% for i in range(99999) %}{% for j in range(99) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(RequestError, match="took more than 500000 steps"):
        asyncio.run(made.chat_prompt(small, 60))


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (lambda i, long: i.completion_prompts(CompletionRequest(prompt=long)), "prompt"),
        (lambda i, long: i.completion_prompts(CompletionRequest(prompt=["x", long])), "prompt"),
        (lambda i, long: i.tokenize(TokenizeRequest(prompt=long), len(long)), "prompt"),
        (lambda i, long: i.chat_prompt(ChatCompletionRequest(**chat(long)), len(long)), "messages"),
        (lambda i, long: i.tokenize(TokenizeChatRequest(**chat(long)), len(long)), "messages"),
        (lambda i, long: i.last_tokens(long, CONTEXT + 1), "prompt"),
    ],
)
def test_what_cannot_fit_is_refused_without_tokenizing(tokenizer: Watched, ask: Any, param: str) -> None:
    with pytest.raises(
        CapacityError, match=rf"context length is {CONTEXT} tokens; the prompt has at least \d+"
    ) as error:
        asyncio.run(ask(intake(tokenizer), "x" * 10**6))
    assert (error.value.http_status, error.value.code, error.value.param) == (400, "context_length_exceeded", param)
    assert len(tokenizer.work) <= 1  # the template
    assert not any(on_loop for on_loop, _ in tokenizer.work)


def test_what_may_fit_is_counted(tokenizer: Watched) -> None:
    with pytest.raises(CapacityError, match=r"the prompt has 2000 tokens \(shorten"):
        asyncio.run(intake(tokenizer).completion_prompts(CompletionRequest(prompt="12" * CONTEXT)))


def test_the_end_of_a_text_is_had_however_long_the_text(tokenizer: Watched) -> None:
    made = intake(tokenizer)
    long = "x" * 10**5 + "a fox"
    for count in (1, 3, CONTEXT):
        assert asyncio.run(made.last_tokens(long, count)) == tokenizer.encode(long)[-count:]
    assert asyncio.run(made.last_tokens("a fox", CONTEXT + 1)) == tokenizer.encode("a fox")
    with pytest.raises(RequestError, match="prompt: expected at least one token, found none"):
        asyncio.run(made.last_tokens("", 3))
    with pytest.raises(CapacityError, match=f"the prompt has {CONTEXT + 1} tokens"):
        asyncio.run(made.last_tokens("12" * CONTEXT, CONTEXT + 1))


def test_parameters_are_refused_before_a_prompt_is_tokenized(tokenizer: Watched) -> None:
    """They are asked for first, and need no prompt."""
    for fields in ({"temperature": -1}, {"best_of": 3}, {"stop_token_ids": [10**6]}, {"bad_words": [""]}):
        with pytest.raises(RequestError):
            asyncio.run(intake(tokenizer).completion_params(CompletionRequest(prompt=LONG, **fields)))
    assert tokenizer.work == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bad_words": ["a"] * 1025}, "bad_words: expected at most 1024 words, found 1025"),
        ({"bad_words": ["a", "b" * 257]}, "bad_words: expected strings of at most 256 characters, found one of 257"),
        ({"stop": ["a"] * 65}, "stop: expected at most 64 strings, found 65"),
        ({"stop": "a" * 1025}, "stop: expected strings of at most 1024 characters, found one of 1025"),
        (
            {"stop_token_ids": [5] * 1000},
            r"stop_token_ids: expected at most \d+ token ids \(the vocabulary\), found 1000",
        ),
        ({"allowed_token_ids": [5] * 1000}, "allowed_token_ids: expected at most"),
        ({"logit_bias": {str(i): 0 for i in range(1000)}}, "logit_bias: expected at most"),
    ],
)
def test_lists_of_parameters_are_bounded(tokenizer: Watched, fields: dict[str, Any], message: str) -> None:
    body = CompletionRequest.model_validate_json(json.dumps({"prompt": "x", **fields}))
    made = intake(tokenizer)
    made.workers = None  # type: ignore[assignment]  # refused before it would wait
    with pytest.raises(RequestError, match=f"^{message}") as caught:
        asyncio.run(made.completion_params(body))
    assert (caught.value.http_status, caught.value.param) == (400, next(iter(fields)))
    assert tokenizer.work == []


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("prompt", [5] * (CONTEXT + 1), "1001 tokens"),
        ("tokens", [5] * (CONTEXT + 1), "1001 tokens"),
        ("messages", [{}] * (CONTEXT + 1), "1001 messages"),
    ],
)
def test_counts_are_refused_by_the_outline(tokenizer: Watched, field: str, value: Any, found: str) -> None:
    made = intake(tokenizer)
    made.limits.check(Outline(json.dumps({field: value[:-1]}).encode()))
    with pytest.raises(CapacityError, match=found) as caught:
        made.limits.check(Outline(json.dumps({field: value}).encode()))
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (CompletionRequest, "prompt"),
        (TokenizeRequest, "prompt"),
        (EmbeddingRequest, "input"),
        (ResponsesRequest, "input"),
    ],
)
@pytest.mark.parametrize("letter", ["a", "\n", "\\", "é", "\N{GRINNING FACE}"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_long_texts_are_refused_by_the_outline(
    tokenizer: Watched, model: type[ApiModel], field: str, letter: str, ascii_only: bool
) -> None:
    """And none that has room."""
    made = intake(tokenizer)
    longest = max(len(tokenizer.decode([i], False).encode()) for i in range(tokenizer.vocab_size))

    def outline(text: str) -> Outline:
        return Outline(json.dumps({field: text}, ensure_ascii=ascii_only).encode(), model)

    with pytest.raises(CapacityError, match=r"at least [0-9]+ tokens") as caught:
        made.limits.check(outline(letter * (12 * longest * CONTEXT)))
    assert caught.value.param == field
    made.limits.check(outline(letter * (longest * CONTEXT // len(letter.encode()))))


@pytest.mark.parametrize(
    ("model", "field"),
    [
        *((model, "prompt") for model in (ChatCompletionRequest, EmbeddingRequest, MessagesRequest, GenerateRequest)),
        *(
            (model, "input")
            for model in (ChatCompletionRequest, CompletionRequest, MessagesRequest, TokenizeChatRequest)
        ),
    ],
)
def test_a_long_text_that_is_ignored_is_no_prompt(tokenizer: Watched, model: type[ApiModel], field: str) -> None:
    made = intake(tokenizer)
    made.limits.check(Outline(json.dumps({field: "a" * 10**6}).encode(), model))


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
def test_more_ids_than_the_vocabulary_are_refused_by_the_outline(tokenizer: Watched, field: str) -> None:
    made, most = intake(tokenizer), tokenizer.vocab_size

    def outline(count: int) -> Outline:
        ids = list(range(count))
        return Outline(json.dumps({field: dict.fromkeys(ids, 1) if field == "logit_bias" else ids}).encode())

    made.limits.check(outline(most))
    with pytest.raises(RequestError, match=f"^{field}: expected at most {most} .*, found {most + 1}$") as caught:
        made.limits.check(outline(most + 1))
    assert (caught.value.http_status, caught.value.param) == (400, field)


def test_variables_of_the_template_are_bounded_by_the_outline(tokenizer: Watched) -> None:
    def outline(size: int) -> Outline:
        return Outline(json.dumps({"chat_template_kwargs": {"a": "x" * (size - len('{"a": ""}'))}}).encode())

    made = intake(tokenizer)
    made.limits.check(outline(MAX_TEMPLATE_BYTES))
    with pytest.raises(RequestError, match=r"^chat_template_kwargs: .* found 65537 ") as caught:
        made.limits.check(outline(MAX_TEMPLATE_BYTES + 1))
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(("field", "most"), [("stop", MAX_STOP_STRINGS), ("bad_words", MAX_BAD_WORDS)])
def test_more_strings_than_are_taken_are_refused_by_the_outline(field: str, most: int) -> None:
    check_sampling(Outline(json.dumps({field: ["a, b"] * most}).encode()))
    with pytest.raises(RequestError, match=f"^{field}: expected at most {most} .*, found {most + 1}$") as caught:
        check_sampling(Outline(json.dumps({field: ["a, b"] * (most + 1)}).encode()))
    assert (caught.value.http_status, caught.value.param) == (400, field)


def test_a_long_body_beyond_the_queue_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps({"prompt": "a" * 200_000}).encode()

    async def run() -> None:
        workers, go = TextWorkers(threads=1, waiting=0), threading.Event()
        context = SimpleNamespace(
            loaded=SimpleNamespace(intake=SimpleNamespace(workers=workers, check_ids=lambda *_: None))
        )
        monkeypatch.setattr(body, "context_of", lambda _: context)
        taken = asyncio.create_task(workers.run(INLINE_BYTES + 1, lambda: go.wait(20)))
        await asyncio.sleep(0)
        request = Request({"type": "http"})
        with pytest.raises(QueueFullError, match="waiting to be parsed"):
            await body.parse_outlined(request, data, Outline(data), CompletionRequest)
        go.set()
        assert await taken
        assert (await body.parse_outlined(request, data, Outline(data), CompletionRequest)).prompt == "a" * 200_000

    asyncio.run(run())


@pytest.mark.parametrize(("size", "at_once"), [(2**19, 2), (2**20, 1)])
def test_very_long_bodies_are_parsed_one_at_a_time(monkeypatch: pytest.MonkeyPatch, size: int, at_once: int) -> None:
    """Each keeps Python's lock from the event loop."""
    both = threading.Barrier(2)
    met: list[bool] = []

    def parsed(*_: Any) -> Any:
        try:
            both.wait(20 if at_once == 2 else 0.2)
        except threading.BrokenBarrierError:
            met.append(False)
        else:
            met.append(True)

    async def run() -> None:
        intake = SimpleNamespace(workers=TextWorkers(threads=2, waiting=2), check_ids=lambda *_: None)
        monkeypatch.setattr(body, "context_of", lambda _: SimpleNamespace(loaded=SimpleNamespace(intake=intake)))
        monkeypatch.setattr(body, "parsed", parsed)
        data = json.dumps({"prompt": "a" * size}).encode()
        request = Request({"type": "http"})
        one = [body.parse_outlined(request, data, Outline(data), CompletionRequest) for _ in range(2)]
        await asyncio.gather(*one)

    asyncio.run(run())
    assert met == [at_once == 2] * 2


def test_work_beyond_the_queue_is_refused_with_a_time() -> None:
    async def run() -> None:
        workers, go = TextWorkers(threads=1, waiting=1), threading.Event()
        taken = [asyncio.create_task(workers.run(INLINE_BYTES + 1, lambda: go.wait(20))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="1 long texts are waiting") as caught:
            await workers.run(INLINE_BYTES + 1, lambda: None)
        assert 1 <= caught.value.retry_after <= 60
        assert await workers.run(INLINE_BYTES, lambda: "short") == "short"
        taken[0].cancel()  # whoever waits for it, the thread is still busy
        with pytest.raises(QueueFullError):
            await workers.run(INLINE_BYTES + 1, lambda: None)
        go.set()
        assert await taken[1]
        assert await workers.run(INLINE_BYTES + 1, lambda: "room") == "room"

    asyncio.run(run())


@pytest.mark.parametrize(("tokens", "on_loop"), [(20, True), (CONTEXT, False)])
@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_a_long_prompt_are_written_in_a_thread(
    tokenizer: Watched, tokens: int, on_loop: bool, stream: bool
) -> None:
    """Also when every place of the queue is taken: the answer is there, and is not refused any more."""
    made = intake(tokenizer)
    made.workers = TextWorkers(threads=1, waiting=0)
    body = CompletionRequest(prompt=[7] * tokens, echo=True, logprobs=4, stream=stream)
    scores = TokenScores.zeros(tokens - 1, 4)
    scores.top_ids[:] = 5000  # which the tokenizer is asked for
    output = TextOutput("id", "", (), None, FinishReason.LENGTH, None, 0, 0, scores, None)

    async def write() -> None:
        made.workers._places.acquire()
        prompts = [Prompt(body.prompt, "")]  # type: ignore[arg-type]
        model = Model("name", made, None, SamplingDefaults({}))  # type: ignore[arg-type]  # nobody asks for the engine's
        answer = CompletionAnswer(model, prompts, 1, body)
        if not stream:
            await answer.response([output])
            return
        generation = Generation(1, lambda _: None)
        generation.push(0, output)
        assert [data async for data in answer.stream(generation)]

    tokenizer.work.clear()
    asyncio.run(write())
    assert tokenizer.work
    assert {thread for thread, _ in tokenizer.work} == {on_loop}
