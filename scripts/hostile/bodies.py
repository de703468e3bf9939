"""Bodies that should not be: each function gives (path, body) pairs for an arena; ``posted`` plays them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from hostile.arena import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, Arena

Bodies = Callable[[Arena], Iterator[tuple[str, bytes]]]
HUGE = 10**400


def posted(bodies: Bodies, times: int = 1, at_once: int = 16) -> Callable[[Arena], Awaitable[None]]:
    """Posts all bodies, ``times`` over, each on a connection of its own."""

    async def play(arena: Arena) -> None:
        made = [arena.post(path, body) for path, body in bodies(arena)] * times
        arena.rng.shuffle(made)
        await arena.crowd([partial(arena.exchange, data) for data in made], at_once)

    return play


def completion(**fields: Any) -> tuple[str, bytes]:
    """A completion of one token, with these fields."""
    return COMPLETIONS, json.dumps({"prompt": [5, 6, 7], "max_tokens": 1, **fields}).encode()


def chat(content: Any = "hi", **fields: Any) -> tuple[str, bytes]:
    """A chat of one token, with these fields."""
    messages = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    return CHAT, json.dumps({**messages, **fields}).encode()


def many_prompts(_: Arena) -> Iterator[tuple[str, bytes]]:
    """10,000 prompts, 128 samples of each."""
    yield completion(prompt=[[5]] * 10_000, n=128)
    yield completion(prompt=["a"] * 10_000, n=128)
    yield completion(prompt=[[5]] * 1025)
    yield completion(prompt=[[5]] * 10_000, n=HUGE)


def huge_json(_: Arena) -> Iterator[tuple[str, bytes]]:
    """Beyond --max-body, and just within it."""
    yield COMPLETIONS, b'{"prompt": "' + b"a" * 33 * 2**20 + b'"}'
    yield COMPLETIONS, b'{"no_such_field": "' + b"a" * 8 * 2**20 + b'"}'
    yield CHAT, b'{"messages": [' + b",".join([b'{"role": "user"}'] * 400_000) + b"]}"
    yield COMPLETIONS, b'{"prompt": [' + b"5," * 2_000_000 + b"5]}"
    yield COMPLETIONS, b" " * 2**22
    yield COMPLETIONS, b'{"prompt": 1' + b"0" * 2**20 + b"}"


def deep_json(_: Arena) -> Iterator[tuple[str, bytes]]:
    """Nested far deeper than any parser recurses."""
    for depth in (500, 10_000, 1_000_000):
        arrays, objects = b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth
        yield COMPLETIONS, arrays
        yield COMPLETIONS, objects
        yield COMPLETIONS, b'{"prompt": ' + arrays + b"}"
        yield TOKENIZE, b'{"messages": ' + arrays + b"}"
        yield CHAT, b'{"messages": [{"role": "user", "content": ' + objects + b"}]}"
        yield CHAT, b'{"messages": [{"role": "user", "content": "a"}], "tools": [' + objects + b', "'


def duplicate_keys(_: Arena) -> Iterator[tuple[str, bytes]]:
    """One key thousands of times, and keys that contradict each other."""
    yield COMPLETIONS, b"{" + b'"prompt": "a",' * 100_000 + b'"max_tokens": 1}'
    yield COMPLETIONS, b'{"prompt": "a", "max_tokens": 1, "max_tokens": 1, "n": 128, "n": 1}'
    yield COMPLETIONS, b'{"prompt": "a", "prompt": ["a", "b"], "prompt": [5], "max_tokens": 1}'


def not_numbers(_: Arena) -> Iterator[tuple[str, bytes]]:
    """NaN and infinities, which JSON does not have."""
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"):
        for name in (b"temperature", b"top_p", b"presence_penalty", b"repetition_penalty", b"n", b"min_p", b"seed"):
            yield COMPLETIONS, b'{"prompt": [5], "max_tokens": 1, "%s": %s}' % (name, value)
        yield COMPLETIONS, b'{"prompt": [5], "max_tokens": 1, "logit_bias": {"5": %s}}' % value


RANGES: dict[str, tuple[Any, ...]] = {
    "n": (0, -1, 129, HUGE),
    "max_tokens": (-1, -HUGE, 2**31, 2**63, HUGE),
    "temperature": (-1, -1e308, -5e-324),
    "top_p": (0, -1, 1.0001, 1e308),
    "top_k": (-2, -HUGE),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (3, -3),
    "frequency_penalty": (3, -3),
    "repetition_penalty": (0, -1),
    "logprobs": (-1, 21, HUGE),
    "prompt_logprobs": (1, -1),
    "min_tokens": (-1, 2, HUGE),
    "priority": (2**31, -(2**31) - 1, HUGE),
    "seed": (HUGE, -HUGE, 0.5, "7"),
    "stop_token_ids": ([-1], [2**31], [2**63], [HUGE], 5),
    "allowed_token_ids": ([], [-1], [2**40], [[5]]),
    "logit_bias": ({"-1": 1}, {"99999999": 1}, {"5": 101}, {"5": "x"}, {"5": {}}, {"x": 1}, {str(HUGE): 1}, [5]),
    "stop": ([1], [None], {"a": 1}, ""),
    "best_of": (2, HUGE),
    "stream_options": ({"include_usage": True}, [], "x"),
    "response_format": ({"type": "json_object"}, {}, "text"),
    "use_beam_search": (True,),
    "guided_regex": ("(a+)+$",),
    "prompt": ([], [[]], "", [5, "a"], [[5], "a"], [-1], [2**31], [HUGE], {}, 5, None, [[[5]]], [None], [True]),
    "stream": ("yes", 1, []),
}


def out_of_range(_: Arena) -> Iterator[tuple[str, bytes]]:
    """Every field, with values that it cannot have."""
    for name, values in RANGES.items():
        for value in values:
            yield completion(**{name: value})


def edges(arena: Arena) -> Iterator[tuple[str, bytes]]:
    """Seeds, ids and sizes at the ends of their ranges, and one beyond."""
    for seed in (0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64):
        yield completion(seed=seed, temperature=1)
        yield completion(seed=seed, temperature=1, n=3)
    for token in (0, 1, 49_151, 49_152, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64):
        yield completion(prompt=[token])
        yield DETOKENIZE, json.dumps({"tokens": [token]}).encode()
        yield completion(stop_token_ids=[token], logit_bias={str(token): -100}, allowed_token_ids=[token])
    for size in (-1, 0, 1, arena.server.max_model_len - 3, arena.server.max_model_len - 2):
        yield completion(max_tokens=size, allowed_token_ids=[5], stop_token_ids=[5])
    for size in (-1, 0, 1):
        yield completion(prompt=[5] * (arena.server.max_model_len + size))
    for priority in (0, 2**31 - 1, -(2**31)):
        yield completion(priority=priority)
    for value in (0.0, 5e-324, 1e-30, 1e308):
        yield completion(temperature=value, repetition_penalty=value or 1)


def long_prompts(arena: Arena) -> Iterator[tuple[str, bytes]]:
    """1 to 10 MB of text, in every place that takes any."""
    for size in (2**20, 10 * 2**20):
        words = "word " * (size // 5)
        noise = "".join(chr(arena.rng.randrange(0x100, 0xD000)) for _ in range(size // 64)) * 20
        for text in (words, noise, "\n" * size):
            yield completion(prompt=text)
            yield TOKENIZE, json.dumps({"prompt": text}).encode()
        yield chat(words)
        yield chat("hi", tools=[{"type": "function", "function": {"description": words}}])
        yield chat("hi", user=words, cache_salt=words)


def many_messages(_: Arena) -> Iterator[tuple[str, bytes]]:
    """Chats of 200,000 messages, and long lists of which the last item alone is wrong."""
    for path in (TOKENIZE, CHAT):
        yield path, json.dumps({"messages": [{"role": "user", "content": "a"}] * 200_000}).encode()
        yield path, json.dumps({"messages": [{}] * 200_000}).encode()
        yield path, json.dumps({"messages": [{"role": "user", "content": "a"}] * 1500 + [{"role": "x"}]}).encode()
        yield (
            path,
            json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 9999}]}).encode(),
        )
    yield DETOKENIZE, json.dumps({"tokens": [5] * 1_000_000}).encode()
    yield DETOKENIZE, json.dumps({"tokens": [5] * 8000 + [-1]}).encode()


def word_floods(_: Arena) -> Iterator[tuple[str, bytes]]:
    """As many stop strings and forbidden words as are taken, and far more."""
    yield completion(bad_words=[f"{i} " * 50 for i in range(1024)])
    yield completion(bad_words=["a b" * 85] * 1024)
    yield completion(bad_words=["a"] * 1_000_000)
    yield completion(stop=[chr(97 + i % 26) * 1024 for i in range(64)], max_tokens=16)
    yield completion(stop=["a"] * 1_000_000)
    yield completion(stop=["a" * 10**6])
    yield completion(stop_token_ids=[5] * 1_000_000)


def bias_floods(_: Arena) -> Iterator[tuple[str, bytes]]:
    """A bias for every token, and for more than there are."""
    yield completion(logit_bias={str(i): -1.5 for i in range(40_000)}, max_tokens=4)
    yield completion(logit_bias={str(i): 1 for i in range(500_000)})
    yield completion(logit_bias={str(i): "x" for i in range(500_000)})
    yield completion(allowed_token_ids=list(range(40_000)), max_tokens=4)
    yield completion(allowed_token_ids=[5] * 1_000_000)


def templates(_: Arena) -> Iterator[tuple[str, bytes]]:
    """Variables of the template's own, and what is made of messages in it."""
    for name in ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "raise_exception", "loop"):
        yield chat(chat_template_kwargs={name: []})
    for name in ("self", "context", "environment", "__class__", "namespace", "range", "", "a b", "\0"):
        yield chat(chat_template_kwargs={name: {"x": [1] * 1000}})
    yield chat(chat_template="{% for i in range(10**9) %}x{% endfor %}")
    yield chat(chat_template_kwargs={str(i): i for i in range(100_000)})
    yield chat(tools=[{"a": 1}] * 10_000, documents=[{"a": "b"}] * 10_000)
    yield CHAT, json.dumps({"messages": [{"role": "{{ 7 * 7 }}", "content": "{% raw %}"}], "max_tokens": 1}).encode()
    yield chat("a", continue_final_message=True)
    yield chat([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])
    yield chat(None)
    yield chat(tool_choice="required")
    yield chat(functions=[{}], function_call="auto")


def strange_texts(_: Arena) -> Iterator[tuple[str, bytes]]:
    """Unicode, NUL, and halves of characters."""
    for text in (
        "\0",
        "a\0b",
        "\u202e\u200d\ufeff",
        "e" + "\u0301" * 5000,
        "\U0010ffff" * 99,
        "\ud800",
        "\udfff\ud800",
    ):
        yield completion(prompt=text)
        yield completion(prompt="a", stop=[text], user=text, cache_salt=text, bad_words=[text])
        yield completion(prompt="a", model=text)
        yield chat(text, chat_template_kwargs={"x": text})
        yield TOKENIZE, json.dumps({"prompt": text}, ensure_ascii=True).encode()
    yield COMPLETIONS, b'{"prompt": "a\x00b"}'
    yield COMPLETIONS, b'{"prompt": "\\u0000", "\\ud800": 1, "max_tokens": 1}'


def broken_utf8(_: Arena) -> Iterator[tuple[str, bytes]]:
    """Bytes that are no UTF-8."""
    for data in (b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80", b"\xe2\x82"):
        yield COMPLETIONS, b'{"prompt": "' + data + b'"}'
        yield CHAT, b'{"messages": [{"role": "user", "content": "' + data + b'"}]}'
        yield COMPLETIONS, data + b'{"prompt": "a"}'
    yield COMPLETIONS, json.dumps({"prompt": "a"}).encode("utf-16")
    yield COMPLETIONS, b"\xef\xbb\xbf" + b'{"prompt": "a'


def costly_answers(arena: Arena) -> Iterator[tuple[str, bytes]]:
    """The most that one request may ask for beside tokens."""
    room = arena.server.max_model_len
    yield completion(prompt=[5] * (room - 1), logprobs=20, echo=True, max_tokens=1)
    yield completion(prompt=[[5, i] for i in range(64)], logprobs=20, n=4, max_tokens=4)
    yield completion(prompt=[5] * 100, prompt_logprobs=0, max_tokens=1)
    yield chat("hi", logprobs=True, top_logprobs=20, n=64, max_tokens=8, stream=True)
