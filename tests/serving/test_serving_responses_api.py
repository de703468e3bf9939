"""The Responses API without a server: input items as messages, events that add up however an answer comes."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fixtures import make_tokenizer
from pydantic import ValidationError

from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.output import OutputProcessor, PositionLogprobs, TextOutput, TokenText
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import TokenLogprobs
from llmctl.errors import NotReadyError, QueueFullError, RequestError
from llmctl.serving.generation import Generation
from llmctl.serving.intake import Intake, Prompt
from llmctl.serving.openai_errors import from_validation_error
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.schema import ResponseObject, ResponseStreamEvent
from llmctl.serving.responses_api.translate import chat_of, renamed
from llmctl.serving.responses_api.truncation import truncated
from llmctl.serving.responses_api.writer import ResponseWriter
from llmctl.serving.sampling_defaults import SamplingDefaults
from llmctl.serving.tools.support import ToolSupport
from llmctl.serving.tools.traits import EFFORT, THINKING, TemplateTraits
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.tokenizer import Tokenizer

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "done"}
REASONING = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "well", "annotations": []}]}
ASKED = {"role": "user", "content": "hi"}


def parsed(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate_json(json.dumps({"input": "hi", **fields}))


def messages(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    chat = chat_of(parsed(input=list(items), **fields), TemplateTraits())
    return [message.model_dump(exclude_unset=True) for message in chat.messages]


def made_call(**more: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}} | more


# Input


def test_reasoning_text_and_calls_are_one_message() -> None:
    turn = {"role": "assistant", "content": "well", "reasoning_content": "hm", "tool_calls": [made_call()]}
    result = {"role": "tool", "content": "done", "tool_call_id": "1", "name": "f"}
    assert messages(ASKED, REASONING, SAID, CALL, RESULT) == [ASKED, turn, result]
    two = [made_call(), made_call(id="2")]
    found = messages(CALL, {**CALL, "call_id": "2"}, RESULT, RESULT)
    assert found == [{"role": "assistant", "content": None, "tool_calls": two}, result, result]


@pytest.mark.parametrize(
    ("items", "contents"),
    [
        ([SAID, SAID], ["well", "well"]),
        ([CALL, SAID], [None, "well"]),
        ([SAID, REASONING, SAID], ["well", "well"]),
        ([REASONING, ASKED], [None, "hi"]),
        ([REASONING, REASONING, SAID], ["well"]),
    ],
)
def test_where_a_message_of_the_assistant_ends(items: list[dict[str, Any]], contents: list[str | None]) -> None:
    assert [message["content"] for message in messages(*items)] == contents


def test_instructions_come_first_and_texts_are_joined() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    found = messages({"role": "developer", "content": parts}, instructions="Be kind.")
    assert found == [{"role": "system", "content": "Be kind."}, {"role": "developer", "content": "a\nb"}]
    summed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": None}
    assert messages(summed)[0]["reasoning_content"] == "so"


def test_what_is_asked_of_chats() -> None:
    fields = {"temperature": 0.5, "top_k": 3, "stop": ["x"], "seed": 1, "stream": True, "cache_salt": "s"}
    chat = chat_of(parsed(**fields, max_output_tokens=7, safety_identifier="me"), TemplateTraits())
    assert {name: getattr(chat, name) for name in fields} == fields
    assert (chat.max_completion_tokens, chat.user, chat.logprobs) == (7, "me", False)
    assert chat_of(parsed(user="a", safety_identifier="b"), TemplateTraits()).user == "a"
    for wanted in ({"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}):
        assert chat_of(parsed(**wanted), TemplateTraits()).logprobs
    assert not chat_of(parsed(top_logprobs=0, include=["reasoning.encrypted_content"]), TemplateTraits()).logprobs


def test_tools_and_how_they_are_chosen() -> None:
    tools = [{**TOOL, "strict": True}, {**TOOL, "name": "g"}]
    chat = chat_of(parsed(tools=tools, tool_choice={"type": "function", "name": "g"}), TemplateTraits())
    assert chat.tool_choice is not None
    assert [tool.model_dump(exclude_unset=True)["function"] for tool in chat.tools or ()] == [
        {"name": "f", "parameters": {"type": "object"}, "strict": True},
        {"name": "g", "parameters": {"type": "object"}},
    ]
    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "g"}]}
        chat = chat_of(parsed(tools=tools, tool_choice=choice), TemplateTraits())
        assert ([tool.function.name for tool in chat.tools or ()], chat.tool_choice) == (["g"], mode)
    with pytest.raises(RequestError, match="tool_choice: expected one of the request's tools, found 'g'"):
        chat_of(parsed(tools=[TOOL], tool_choice=choice), TemplateTraits())


@pytest.mark.parametrize(
    ("known", "effort", "told"),
    [
        ((EFFORT,), "low", {EFFORT: "low"}),
        ((THINKING,), "low", {THINKING: True}),
        ((THINKING,), "none", {THINKING: False}),
        ((), "low", {}),
        ((EFFORT, THINKING), None, {}),
    ],
)
def test_an_effort_is_told_as_the_template_takes_it(known: Sequence[str], effort: Any, told: dict[str, Any]) -> None:
    traits = TemplateTraits(reasoning_variables=frozenset(known))
    assert chat_of(parsed(reasoning={"effort": effort}), traits).chat_template_kwargs == told
    chat = chat_of(parsed(reasoning={"effort": effort}, chat_template_kwargs={THINKING: 1}), traits)
    assert chat.chat_template_kwargs == told | {THINKING: 1}


# Refusals


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"id": "msg_1", "type": "item_reference"}]}, "input", "input.0: expected type 'message' or"),
        ({"input": [ASKED, {"role": "user", "content": 5}]}, "input", "input.1.content: "),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input", "input.0.encrypted_content: another"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools.0: expected type 'function', found 'web_search'; there"),
        ({"tools": [{"name": "f"}]}, "tools", "tools.0: expected type 'function', found none"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "'required' or an object"),
        ({"text": {"format": {"type": "grammar"}}}, "text", "text.format: expected type 'text' or"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "text.format.schema: Field required"),
        ({"text": {"verbosity": "low"}}, "text", "text.verbosity: not supported"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning", "reasoning.summary: not supported; reasoning comes"),
        ({"previous_response_id": "x"}, "previous_response_id", "keeps no responses; send the whole"),
        ({"conversation": "x"}, "conversation", "keeps no responses"),
        ({"background": True}, "background", "use stream"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options", "include_obfuscation: not supported"),
        ({"service_tier": "flex"}, "service_tier", "one tier"),
        ({"n": 2}, "n", "one output"),
        ({"response_format": {"type": "text"}}, "response_format", "use text.format"),
        ({"messages": []}, "messages", "use input"),
        ({"metadata": {"k" * 1000: "v"}}, "metadata", "kkk.[key]: String should have at most 64"),
        ({"include": ["everything"]}, "include", "include.0: Input should be 'message.output_text.logprobs'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parsed(**fields)
    error = from_validation_error(caught.value)
    assert error.param == param
    assert said in str(error)
    assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({**CALL, "arguments": "{"}, r"input\[1\].arguments: expected a JSON object"),
        ({"role": "user", "content": [{"type": "input_image"}]}, r"input\[1\].content: only parts .* 'input_image'"),
        (RESULT, r"^input\[1\]: no tool call found for function call output with call_id '1'$"),
        ({**RESULT, "output": [{"type": "input_file"}]}, r"input\[1\].output: only parts .* found 'input_file'"),
    ],
)
def test_an_item_that_cannot_be_shown_is_refused_by_its_place(item: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        messages(ASKED, item)
    assert caught.value.param == "input"


def test_what_asks_for_nothing_is_accepted() -> None:
    nothing = {"store": True, "background": False, "service_tier": "auto", "truncation": "disabled", "n": 1}
    given = parsed(**nothing, previous_response_id=None, text={"format": {"type": "text"}, "verbosity": "medium"})
    assert chat_of(given, TemplateTraits()).response_format is None


def test_refusals_of_chats_are_put_in_this_apis_words() -> None:
    error = RequestError(
        "min_tokens: expected at most max_tokens (5), found response_format and 'max_tokens' in xmax_tokens",
        fix="lower max_completion_tokens",
        param="response_format",
    )
    made = renamed(error)
    assert type(made) is RequestError
    assert str(made) == (
        "min_tokens: expected at most max_output_tokens (5), found text.format and 'max_tokens' in xmax_tokens "
        "(lower max_output_tokens)"
    )
    assert (made.param, renamed(RequestError("x", param="messages")).param) == ("text.format", "input")
    assert str(error).startswith("min_tokens: expected at most max_tokens")


def _said(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text * 10}


@pytest.mark.parametrize(
    ("input_", "room", "kept"),
    [
        ([_said("a"), _said("b", "assistant"), _said("c")], 1000, "a b c"),
        ([_said("a"), _said("b", "assistant"), _said("c")], 25, "b c"),
        ([_said("a"), _said("b", "assistant"), _said("c")], 15, "c"),
        ([_said("a", "developer"), _said("b"), _said("c")], 25, "a c"),  # instructions stay
        ([_said("a"), _said("b", "assistant")], 15, "a b"),  # the last of the user's and the last item: too long
        ([_said("a"), CALL, _said("b", "assistant"), RESULT, _said("c")], 30, "1 b 1 c"),
        ([_said("a"), CALL, _said("b", "assistant"), RESULT, _said("c")], 22, "b c"),  # a call and its result
        ([_said("a"), _said("b"), CALL, RESULT], 20, "b 1 1"),  # the last item, and its call
        ("a" * 10, 5, "a"),
    ],
)
def test_truncation_leaves_out_the_first_items(tokenizer: Tokenizer, input_: Any, room: int, kept: str) -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    source = f"{{% for m in messages %}}{{{{ m.content or '' }}}}{calls}{{% endfor %}}"
    intake = Intake(
        tokenizer, ChatTemplate(source), max_model_len=room + 3, vocab_size=tokenizer.vocab_size, defaults={}
    )
    asked = parsed(input=input_, truncation="auto", max_output_tokens=3)
    chat = asyncio.run(truncated(asked, intake, 100))
    found = [str((m.content or "1")[:1]) if m.role != "tool" else "1" for m in chat.messages]
    assert " ".join(found) == kept


SOURCES = {
    "roles": "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    "steps": "{% for m in messages %}{% if m.role != 'user' %}{% for i in range(99999) %}{% for j in range(99) %}"
    "{% endfor %}{% endfor %}{% endif %}{% endfor %}x",
}


@pytest.mark.parametrize(("name", "kept"), [("roles", 0), ("steps", 1)])
def test_truncation_leaves_nothing_out_for_another_reason_than_length(
    tokenizer: Tokenizer, name: str, kept: int
) -> None:
    intake = Intake(
        tokenizer, ChatTemplate(SOURCES[name]), max_model_len=1000, vocab_size=tokenizer.vocab_size, defaults={}
    )
    asked = parsed(input=[_said("a", "assistant"), _said("b")], truncation="auto")
    if kept:
        assert len(asyncio.run(truncated(asked, intake, 100)).messages) == kept
    else:
        with pytest.raises(RequestError, match="no"):
            asyncio.run(truncated(asked, intake, 100))


# Events


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def outputs_of(tokenizer: Tokenizer, text: str, reason: FinishReason, **params: Any) -> list[TextOutput]:
    """An answer, an output a token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    processor = OutputProcessor(tokenizer)
    processor.add("id", [5], SamplingParams(logprobs=1, **params))
    made = []
    for index, token in enumerate(ids):
        scores = (TokenLogprobs(-0.5, 1, (token,), (-0.5,)),)
        last = reason if index + 1 == len(ids) else None
        made.append(TokenOutput("id", (token,), logprobs=scores, finish_reason=last, ends_in_text=last is not None))
    return [output for step in made for output in processor.process([step]).outputs]


ANSWERS = [
    "Hello é🎉 there",
    "<think></think>é",
    "<think>I wonder\n</think>\n\nSo it is.",
    '<think>hm</think>On it.\n<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}}</tool_call> and so',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": {"b": 1}}</tool_call>',
    'Just <tool_call> text. {"name"',
    '<tool_call>{"name": "f", "arguments": {"a": 1]} and more',
    "<think>never ends",
]


def writer(tokenizer: Tokenizer, **fields: Any) -> ResponseWriter:
    support = ToolSupport.of(tokenizer, None, tool_call_parser="hermes", reasoning_parser="qwen3")
    intake = Intake(tokenizer, None, max_model_len=512, vocab_size=384, defaults={}, tools=support)
    model: Any = SimpleNamespace(name="m", intake=intake, defaults=SamplingDefaults({}))
    asked = parsed(tools=[TOOL, {**TOOL, "name": "g"}], **fields)
    chat = chat_of(asked, support.traits)
    return ResponseWriter(asked, model, Prompt([5, 6], "x"), 1, chat, support.use(chat))


def streamed(made: ResponseWriter, outputs: Sequence[TextOutput], seed: int, error: Exception | None = None) -> Any:
    """The events of a stream of outputs that come together at random."""
    draw = random.Random(seed)

    async def collect() -> bytes:
        generation = Generation(1, lambda _: None)

        async def push() -> None:
            for output in outputs:
                generation.push(0, output)
                if draw.random() < 0.5:
                    await asyncio.sleep(0)
            if error is not None:
                await asyncio.sleep(0)
                generation.fail(error)

        task = asyncio.create_task(push())
        data = b"".join([part async for part in made.stream(generation)])
        await task
        return data

    return list(events_of(asyncio.run(collect())))


def events_of(data: bytes) -> Iterator[dict[str, Any]]:
    *events, rest = data.split(b"\n\n")
    assert rest == b""
    for number, event in enumerate(events):
        name, text = event.split(b"\n")
        found = json.loads(text.removeprefix(b"data: "))
        ResponseStreamEvent.model_validate_json(text.removeprefix(b"data: "))
        assert name.decode() == f"event: {found['type']}"
        assert found["sequence_number"] == number
        yield found


def replayed(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that events add up to. An event that cannot come where it does fails."""
    items: list[dict[str, Any]] = []
    status = {}
    for event in events:
        kind = event["type"].removeprefix("response.")
        index = event.get("output_index")
        item = items[index] if index is not None and index < len(items) else None
        if kind == "output_item.added":
            assert (index, event["item"]["status"]) == (len(items), "in_progress")
            assert all(state == "done" for state in status.values())
            items.append(event["item"])
            status[index] = "open"
            continue
        if index is None:
            continue
        assert item is not None
        assert status[index] == "open"
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind.endswith(".delta"):
            item["content"][0]["text"] += event["delta"]
            if "logprobs" in event:
                item["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == item["content"][0]["text"]
            assert event.get("logprobs") == item["content"][0].get("logprobs")
        elif kind == "content_part.done":
            assert event["part"] == item["content"][0]
        else:
            assert kind == "output_item.done"
            assert {**event["item"], "status": "in_progress"} == item
            items[index] = event["item"]
            status[index] = "done"
    assert set(status.values()) <= {"done"}
    return items


def without_ids(items: Any) -> Any:
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_events_add_up_to_the_whole_response(tokenizer: Tokenizer, number: int, scored: bool) -> None:
    reason = FinishReason.STOP if number % 2 else FinishReason.LENGTH
    outputs = outputs_of(tokenizer, ANSWERS[number], reason)
    if not scored:
        outputs = [msgspec.structs.replace(output, logprobs=None) for output in outputs]
    made = writer(tokenizer)
    whole = json.loads(asyncio.run(made.response(list(outputs))).body)
    ResponseObject.model_validate(whole)
    kinds = set()
    for seed in range(20):
        events = streamed(writer(tokenizer), outputs, seed)
        assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
        assert events[-1]["type"] == f"response.{whole['status']}"
        last = events[-1]["response"]
        assert replayed(events) == last["output"]
        assert without_ids(last["output"]) == without_ids(whole["output"])
        assert last["usage"] == whole["usage"]
        kinds.add(tuple(event["type"] for event in events if not event["type"].endswith(".delta")))
    assert len(kinds) == 1
    assert whole["status"] == ("completed" if reason is FinishReason.STOP else "incomplete")
    assert bool(whole["incomplete_details"]) == (reason is FinishReason.LENGTH)


def test_items_of_an_answer_and_their_log_probabilities(tokenizer: Tokenizer) -> None:
    whole = json.loads(
        asyncio.run(writer(tokenizer).response(outputs_of(tokenizer, ANSWERS[3], FinishReason.STOP))).body
    )
    reasoning, message, call, rest = whole["output"]
    assert reasoning["content"][0]["text"] == "hm"
    assert (call["arguments"], call["status"]) == ('{"a": [1, "}"]}', "completed")
    for item, text in ((message, "On it."), (rest, " and so")):
        (part,) = item["content"]
        assert part["text"] == text
        tokens = "".join(entry["token"] for entry in part["logprobs"])
        assert text in tokens
        assert not {"think>", "tool_call>"} & set(re.findall(r"\w+>", tokens))
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len(
        tokenizer.encode("hm", add_special_tokens=False)
    )


@pytest.mark.parametrize(
    ("number", "statuses"),
    [
        (4, ["completed", "completed"]),
        (6, ["incomplete", "completed"]),
        (7, ["completed"]),
    ],
)
def test_the_status_of_items(tokenizer: Tokenizer, number: int, statuses: list[str]) -> None:
    for reason, last in ((FinishReason.STOP, statuses[-1]), (FinishReason.LENGTH, "incomplete")):
        made = writer(tokenizer)
        whole = json.loads(asyncio.run(made.response(outputs_of(tokenizer, ANSWERS[number], reason))).body)
        found = [item["status"] for item in whole["output"]]
        assert found[:-1] == statuses[:-1]
        assert found[-1] == ("completed" if whole["output"][-1]["type"] == "function_call" else last)


def whole_of(made: ResponseWriter, outputs: list[TextOutput]) -> Any:
    return json.loads(asyncio.run(made.response(outputs)).body)


def test_a_call_is_over_with_its_arguments(tokenizer: Tokenizer) -> None:
    """Not with what follows: a client may begin to call."""
    outputs = outputs_of(tokenizer, '<tool_call>{"name": "f", "arguments": {}} </tool_call>', FinishReason.STOP)
    begun = next(n for n in range(len(outputs)) if "".join(o.text for o in outputs[:n]).endswith(" </tool"))
    made = writer(tokenizer)
    told = [event["type"] for output in outputs[:begun] for event in made._told(output)]
    assert told[-1] == "response.output_item.done"


def test_an_answer_of_nothing_is_an_empty_message(tokenizer: Tokenizer) -> None:
    (output,) = outputs_of(tokenizer, "e", FinishReason.STOP)
    whole = whole_of(writer(tokenizer), [msgspec.structs.replace(output, text="")])
    ((part,),) = (item["content"] for item in whole["output"])
    assert (part["text"], len(part["logprobs"])) == ("", 1)
    assert whole["status"] == "completed"


def test_a_token_that_the_tokenizer_does_not_know_has_no_bytes(tokenizer: Tokenizer) -> None:
    (output,) = outputs_of(tokenizer, "e", FinishReason.STOP)
    unknown = TokenText(999, "", None, -1.0, 1)
    scored = msgspec.structs.replace(output, logprobs=(PositionLogprobs(unknown, (unknown,)),))
    ((part,),) = (item["content"] for item in whole_of(writer(tokenizer), [scored])["output"])
    (entry,) = part["logprobs"]
    assert (entry["token"], entry["bytes"], entry["top_logprobs"][0]["bytes"]) == ("token_id:999", [], [])


def test_reasoning_is_no_more_tokens_than_the_answer(tokenizer: Tokenizer) -> None:
    outputs = outputs_of(tokenizer, ANSWERS[2], FinishReason.STOP)
    details = whole_of(writer(tokenizer), outputs)["usage"]["output_tokens_details"]
    assert details["reasoning_tokens"] == len(tokenizer.encode("I wonder", add_special_tokens=False))
    few = [msgspec.structs.replace(output, token_ids=()) for output in outputs]
    assert whole_of(writer(tokenizer), few)["usage"]["output_tokens_details"]["reasoning_tokens"] == 0


def test_one_call_where_one_is_asked_for(tokenizer: Tokenizer) -> None:
    made = writer(tokenizer, parallel_tool_calls=False)
    whole = json.loads(asyncio.run(made.response(outputs_of(tokenizer, ANSWERS[4], FinishReason.STOP))).body)
    assert [item["name"] for item in whole["output"]] == ["f"]
    assert whole["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (NotReadyError("gone"), "not_ready", "server_error"),
        (QueueFullError("full"), "queue_full", "rate_limit_exceeded"),
        (RequestError("response_format: no", param="response_format"), "invalid_request_error", "invalid_prompt"),
    ],
)
def test_a_stream_that_fails(tokenizer: Tokenizer, error: Any, code: str, kind: str) -> None:
    outputs = outputs_of(tokenizer, ANSWERS[0], FinishReason.STOP)[:5]
    events = streamed(writer(tokenizer), outputs, 1, error)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["code"] == code
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", kind)
    assert replayed(events) == failed["output"]
    assert failed["output"][0]["status"] == "incomplete"
    if error.param is not None:
        assert (events[-2]["param"], events[-2]["message"]) == ("text.format", "text.format: no")


def test_a_stream_that_fails_before_there_is_anything(tokenizer: Tokenizer) -> None:
    events = streamed(writer(tokenizer), [], 1, QueueFullError("full"))
    kinds = ["response.created", "response.in_progress", "error", "response.failed"]
    assert [event["type"] for event in events] == kinds
    assert events[-1]["response"]["output"] == []


def test_what_is_repeated_of_a_request(tokenizer: Tokenizer) -> None:
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    fields = {"metadata": {"a": "b"}, "instructions": "Be kind.", "max_output_tokens": 9, "user": "me", "top_p": 0.5}
    made = writer(tokenizer, **fields, text={"format": schema}, tool_choice={"type": "function", "name": "f"})
    whole = json.loads(asyncio.run(made.response([])).body)
    ResponseObject.model_validate(whole)
    assert {name: whole[name] for name in fields} == fields
    assert whole["text"]["format"] == {**schema, "description": None}
    assert whole["tool_choice"] == {"type": "function", "name": "f"}
    assert [tool["name"] for tool in whole["tools"]] == ["f", "g"]
    assert (whole["temperature"], whole["store"], whole["reasoning"]["effort"]) == (1.0, False, None)
