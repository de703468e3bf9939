"""Bodies that must be refused, of many tiny values: for every endpoint that takes a body, a list of forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
TGI = ("/generate", "/generate_stream", "/")
ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

MESSAGE: dict[str, Any] = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {"name": "f"}
TOOL = {"type": "function", "function": FUNCTION}
ITEM = {"type": "message", "role": "user", "content": "a"}
UNTAGGED = {"role": "user", "content": "a"}
CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "a"}

Case = tuple[str, str, bytes]
"""Path, name, body."""


def bodies(size: int) -> Iterator[Case]:
    """All cases, of about ``size`` bytes each."""
    for part in (_chats, _texts, _tokens, _messages, _responses, _tgi, _adapters, _strangers):
        yield from part(size)


def many(unit: Any, size: int, *last: Any) -> list[Any]:
    """So many of a value that they are ``size`` bytes, and some others behind."""
    return [unit] * max(1, size // (len(json.dumps(unit)) + 2)) + [*last]


def wide(value: Any, size: int) -> dict[str, Any]:
    """So many members of a value that they are ``size`` bytes."""
    return {f"f{i}": value for i in range(max(1, size // (len(json.dumps(value)) + 10)))}


def numbered(value: Any, size: int, **more: Any) -> dict[str, Any]:
    """Members whose names are token ids."""
    return {**{str(i): value for i in range(max(1, size // (len(json.dumps(value)) + 9)))}, **more}


def _case(path: str, name: str, fields: Any) -> Case:
    return path, name, json.dumps(fields).encode()


def _chats(size: int) -> Iterator[Case]:
    def chat(name: str, **fields: Any) -> Case:
        return _case(CHAT, name, {"messages": [MESSAGE], **fields})

    plain = many(MESSAGE, size)
    yield chat("messages, the last wrong", messages=many(MESSAGE, size, {"role": "x"}))
    yield chat("messages without roles", messages=many({}, size))
    yield chat("messages, n wrong", messages=plain, n="x")
    yield chat("messages, n out of range", messages=plain, n=0)
    yield chat("messages, temperature wrong", messages=plain, temperature="x")
    yield chat("messages, another model", messages=plain, model="x")
    yield chat("messages, stream_options alone", messages=plain, stream_options={"include_usage": True})
    yield chat("messages, top_logprobs alone", messages=plain, top_logprobs=3)
    yield chat("messages, a deadline wrong", messages=plain, deadline="x")
    yield chat("messages, a template", messages=plain, chat_template="{{ 1 }}")
    yield chat("messages, one without content", messages=many(MESSAGE, size, {"role": "user"}))
    yield chat("messages as numbers", messages=many([5], size))
    yield chat("messages as an object", messages=wide(1, size))
    yield chat("parts, the last wrong", messages=[{"role": "user", "content": many(PART, size, 5)}])
    yield chat("parts, the last an image", messages=[{"role": "user", "content": many(PART, size, {"type": "image"})}])
    yield chat("parts as numbers", messages=[{"role": "user", "content": many([5], size)}])
    yield chat("calls, the last wrong", messages=[{"role": "assistant", "tool_calls": many(CALL, size, {})}])
    yield chat("a message, unknown members, a wrong role", messages=[{**wide(1, size), "role": "x"}])
    yield chat("tools, the last wrong", tools=many(TOOL, size, {"type": "x"}))
    yield chat("tools without functions", tools=many({"a": 1}, size))
    yield chat("tools, the choice wrong", tools=many(TOOL, size), tool_choice=5)
    yield chat("tools, the choice another", tools=many(TOOL, size), tool_choice={"type": "x"})
    yield chat(
        "a tool's parameters, its name wrong", tools=[{**TOOL, "function": {"name": "", "parameters": wide(1, size)}}]
    )
    yield chat("functions, the last wrong", functions=many(FUNCTION, size, 5))
    yield chat("documents, the last wrong", documents=many({"a": "b"}, size, 5))
    yield chat("documents as numbers", documents=many([5], size))
    yield chat("template variables", chat_template_kwargs=wide(1, size))
    yield chat("a format's schema, n wrong", n="x", response_format={"type": "json_object", "schema": wide(1, size)})
    yield chat("a format that is none", response_format=wide(1, size))
    yield chat("a schema, n wrong", n="x", guided_json=wide([1], size))
    yield chat("a field that is refused", structural_tag=many([5], size))


def _texts(size: int) -> Iterator[Case]:
    def completion(name: str, **fields: Any) -> Case:
        return _case(COMPLETIONS, name, {"prompt": "a", **fields})

    for path, field in ((COMPLETIONS, "prompt"), (EMBEDDINGS, "input")):
        for name, prompt in {
            "prompts of an id": many([5], size),
            "prompts of a letter": many("a", size),
            "prompts of nothing": many([], size),
            "ids": many(5, size),
            "ids, the last below 0": many(5, 40_000, -1),
            "ids, the last a text": many(5, 40_000, "a"),
            "ids, the last not the model's": many(49_000, 50_000, 10**6),
            "lists of ids, the last not the model's": [many(5, 20_000)] * 4 + [many(5, 20_000, 10**6)],
            "an object": wide(1, size),
            "lists of lists": many([[5]], size),
        }.items():
            yield _case(path, f"{field}: {name}", {field: prompt})
        yield _case(path, f"{field} of few prompts, wrong", {field: [many(5, 40_000), many(5, 40_000, "a")]})
        yield _case(path, f"{field} of ids, priority wrong", {field: many(5, 40_000), "priority": "x"})
    yield completion("stop strings", stop=many("a", size))
    yield completion("stop as lists", stop=many([5], size))
    yield completion("stop as an object", stop=wide(1, size))
    yield completion("bad words", bad_words=many("a", size))
    yield completion("bad words as lists", bad_words=many([5], size))
    yield completion("stop ids, the last wrong", stop_token_ids=many(5, size, -1))
    yield completion("stop ids, the last not the model's", stop_token_ids=many(5, size, 10**6))
    yield completion("stop ids as lists", stop_token_ids=many([5], size))
    yield completion("allowed ids, the last not the model's", allowed_token_ids=many(5, size, 10**6))
    yield completion("allowed ids, the last wrong", allowed_token_ids=many(5, size, -1))
    yield completion("biases, the last wrong", logit_bias=numbered(1, size, x="x"))
    yield completion("biases, the last not the model's", logit_bias=numbered(1, size, **{"1000000": 1}))
    yield completion("biases, the last out of range", logit_bias=numbered(1, size, **{"5": 101}))
    yield completion("biases, a name wrong", logit_bias=numbered(1, size, x=1))
    yield completion("biases of lists", logit_bias=numbered([5], size))
    yield completion("biases, n wrong", logit_bias=numbered(1, size), n="x")
    yield completion("choices, the last wrong", guided_choice=many("a", size, 5))
    yield completion("choices as lists", guided_choice=many([5], size))
    yield completion("structured outputs, unknown", structured_outputs=wide(1, size))
    yield completion("stream options, wrong", stream=True, stream_options={**wide(1, size), "include_usage": 5})
    yield completion("unknown fields, n wrong", **wide(1, size), n="x")
    yield completion("unknown fields of lists, n wrong", **wide([[5]], size), n="x")
    yield completion("an unknown field, n wrong", x=many({"a": 1}, size), n="x")
    yield completion("an unknown field, deep and wide, n wrong", x=many([[[[[]]]]], size), n="x")
    yield completion("an unknown field, no prompt", prompt=None, x=many([5], size))


def _tokens(size: int) -> Iterator[Case]:
    yield _case(TOKENIZE, "messages, the last wrong", {"messages": many(MESSAGE, size, {"role": "x"})})
    yield _case(TOKENIZE, "messages, a flag wrong", {"messages": many(MESSAGE, size), "add_special_tokens": 5})
    yield _case(TOKENIZE, "tools, the last wrong", {"messages": [MESSAGE], "tools": many(TOOL, size, 5)})
    yield _case(TOKENIZE, "a prompt of lists", {"prompt": many([5], size)})
    yield _case(TOKENIZE, "an unknown field, no prompt", {"x": many([5], size)})
    yield _case(DETOKENIZE, "tokens, the last wrong", {"tokens": many(5, 24_000, -1)})
    yield _case(DETOKENIZE, "tokens, the last not the model's", {"tokens": many(5, 24_000, 10**6)})
    yield _case(DETOKENIZE, "tokens", {"tokens": many(5, size)})
    yield _case(DETOKENIZE, "tokens as lists", {"tokens": many([5], size)})


def _messages(size: int) -> Iterator[Case]:
    for path in (MESSAGES, COUNT):

        def message(name: str, path: str = path, **fields: Any) -> Case:
            return _case(path, name, {"max_tokens": 1, "messages": [MESSAGE], **fields})

        yield message("messages, the last wrong", messages=many(MESSAGE, size, {"role": "x", "content": "a"}))
        yield message("messages, another field wrong", messages=many(MESSAGE, size), tool_choice=5)
        yield message("messages as lists", messages=many([5], size))
        yield message("blocks, the last wrong", messages=[{"role": "user", "content": many(PART, size, {"type": "x"})}])
        yield message("blocks as lists", messages=[{"role": "user", "content": many([5], size)}])
        yield message("results, the last wrong", messages=[{"role": "user", "content": many(RESULT, size, {})}])
        yield message("system, the last wrong", system=many(PART, size, {"type": "image"}))
        yield message("system as lists", system=many([5], size))
        tool = {"name": "f", "input_schema": {}}
        yield message("tools, the last wrong", tools=many(tool, size, {"name": "f"}))
        yield message("a tool's schema, its name wrong", tools=[{"name": "", "input_schema": wide(1, size)}])
        yield message("a field that is refused", context_management=many([5], size))
        yield message("an unknown field, no messages", messages=None, x=many([5], size))
    yield _case(MESSAGES, "messages, n", {"max_tokens": 1, "messages": many(MESSAGE, size), "n": 2})
    yield _case(MESSAGES, "messages, no max_tokens", {"messages": many(MESSAGE, size)})
    yield _case(MESSAGES, "stop_sequences", {"max_tokens": 1, "messages": [MESSAGE], "stop_sequences": many("a", size)})


def _responses(size: int) -> Iterator[Case]:
    def response(name: str, **fields: Any) -> Case:
        return _case(RESPONSES, name, {"input": "a", **fields})

    yield response("items, the last wrong", input=many(ITEM, size, {"role": "x", "content": "a"}))
    yield response("items, the last of no known type", input=many(ITEM, size, {"type": "x"}))
    yield response("items of several kinds, the last wrong", input=many(CALLED, size, ITEM, {"role": "x"}))
    yield response(
        "items of several kinds, a part wrong", input=many(UNTAGGED, size, CALLED, {**UNTAGGED, "content": [5]})
    )
    yield response("items, n", input=many(ITEM, size), n=2)
    yield response("items, temperature wrong", input=many(ITEM, size), temperature="x")
    yield response("items as lists", input=many([5], size))
    yield response("parts, the last wrong", input=[{"role": "user", "content": many(PART, size, 5)}])
    yield response("parts, the last an image", input=[{"role": "user", "content": many(PART, size, {"type": "image"})}])
    yield response("tools, the last wrong", tools=many({"type": "function", "name": "f"}, size, {"type": "x"}))
    yield response("tools, their choice wrong", tools=many({"type": "function", "name": "f"}, size), tool_choice=5)
    yield response("include, the last wrong", include=many("file_search_call.results", size, "x"))
    yield response("metadata", metadata=wide([5], size))
    yield response("an unknown field, stream wrong", x=many([5], size), stream=5)


def _tgi(size: int) -> Iterator[Case]:
    for path in TGI:

        def generate(name: str, path: str = path, **fields: Any) -> Case:
            return _case(path, name, {"inputs": "a", **fields})

        yield generate("inputs as lists", inputs=many([5], size))
        yield generate("stop strings", parameters={"stop": many("a", size)})
        yield generate("stop as lists", parameters={"stop": many([5], size)})
        yield generate("unknown parameters, one wrong", parameters={**wide(1, size), "top_k": "x"})
        yield generate(
            "a schema, a parameter wrong",
            parameters={"grammar": {"type": "json", "value": wide([1], size)}, "top_k": "x"},
        )
        yield generate("an unknown field, n", x=many([5], size), n=2)
        yield generate("a field that is refused", tools=many({"a": 1}, size))


def _adapters(size: int) -> Iterator[Case]:
    for path in ADAPTERS:
        yield _case(path, "a name of lists", {"lora_name": many([5], size), "lora_path": "a"})
        yield _case(path, "an unknown field, no name", {"x": many([5], size)})


def _strangers(size: int) -> Iterator[Case]:
    """What is no JSON object, for every endpoint alike."""
    lists = json.dumps(many([5], size)).encode()
    objects = json.dumps(many({"a": 1}, size)).encode()
    for path in (CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, TOKENIZE, DETOKENIZE, "/", *ADAPTERS):
        yield path, "a list of lists", lists
        yield path, "an object without an end", b'{"x": ' + objects
        yield path, "an object, and more", b'{"x": ' + objects + b"} x"
        yield path, "NaN at the end", b'{"x": ' + objects + b', "y": NaN}'
        yield path, "one name again and again", b"{" + b'"a": 1, ' * (size // 8) + b'"b": 1}'
