"""The clients of ``soak.py``: requests of every kind against an OpenAI-compatible server, each judged as it ends."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

KINDS = {
    "completion": 3,
    "completion_stream": 3,
    "chat": 2,
    "chat_stream": 3,
    "logprobs": 2,
    "stop": 1,
    "probe": 3,
    "leave_stream": 2,
    "leave_prefill": 1,
    "too_long": 1,
}
"""What a client does next, by weight."""
PROBES = 12
BEAT_SECONDS = 0.05
WORDS = (
    "the quick brown fox jumps over a lazy dog while engines read graphs and kernels write numbers into caches of "
    "light every answer has its question and no river forgets the mountain it came from or the sea where it must go"
).split()


class OwnClock:
    """Time that goes on only while this process does, seconds: what holds the soak itself up (its own work, a busy or
    halted machine) is no stall of the server.

    Attributes:
        longest: time for which it was held up at once.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._held = 0.0
        self._beat = float("inf")  # until somebody listens, nothing counts as held up

    def now(self) -> float:
        """The time, with all that is known of being held up taken off, and what shows at this very moment."""
        now = time.monotonic()
        return now - self._held - self._late(now)

    async def listen(self) -> None:
        """For ever: note how late this process wakes."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)
            late = self._late(time.monotonic())
            self._held, self.longest = self._held + late, max(self.longest, late)

    def _late(self, now: float) -> float:
        return max(0.0, now - self._beat - BEAT_SECONDS)


@dataclass
class Record:
    """What the clients saw. answers: by kind, and how many failed; probes: text of each seeded request; chunk_gap:
    longest time between two chunks of a stream, seconds of ``clock``."""

    answers: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    probes: dict[int, str] = field(default_factory=dict)
    chunk_gap: float = 0.0
    clock: OwnClock = field(default_factory=OwnClock)

    def fail(self, what: str) -> None:
        """Note a failure; the first hundred are kept."""
        self.answers["failed"] += 1
        if len(self.errors) < 100:
            self.errors.append(what)


@dataclass(frozen=True)
class Endpoint:
    """The server under test."""

    url: str
    model: str
    max_model_len: int

    @property
    def prompt_words(self) -> int:
        """The most that fill half of the context (at 1.5 tokens a word)."""
        return max(1, int(0.5 * self.max_model_len / 1.5))

    @property
    def answer_tokens(self) -> int:
        """The most to be asked for: a quarter of the context; the last quarter is for the chat template."""
        return max(1, self.max_model_len // 4)


class Client:
    """One client's requests; ``record`` is shared by all."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: Endpoint, record: Record, rng: random.Random) -> None:
        self.session, self.endpoint, self.record, self.rng = session, endpoint, record, rng

    async def act(self) -> None:
        """One request of a random kind, judged."""
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        try:
            await getattr(self, f"_{kind}")()
            self.record.answers[kind] += 1
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError) as error:
            self.record.fail(f"{kind}: {type(error).__name__}: {error}")

    async def _completion(self) -> None:
        answer = await self._json("completions", prompt=self._words(), max_tokens=self._length(), temperature=0.8)
        _expect(answer["usage"]["completion_tokens"] > 0, f"no tokens in {answer}")

    async def _completion_stream(self) -> None:
        await self._stream("completions", prompt=self._words(), max_tokens=self._length(), temperature=0.0)

    async def _chat(self) -> None:
        answer = await self._json("chat/completions", messages=self._messages(), max_tokens=self._length(), top_p=0.9)
        _expect(answer["choices"][0]["message"]["role"] == "assistant", f"no answer in {answer}")

    async def _chat_stream(self) -> None:
        await self._stream("chat/completions", messages=self._messages(), max_tokens=self._length(), top_k=40)

    async def _logprobs(self) -> None:
        answer = await self._json("completions", prompt=self._words(), max_tokens=8, logprobs=5, ignore_eos=True)
        _expect(len(answer["choices"][0]["logprobs"]["token_logprobs"]) > 0, f"no logprobs in {answer}")

    async def _stop(self) -> None:
        answer = await self._json(
            "completions", prompt=self._words(), max_tokens=self._length(), stop=[" the", "."], n=2
        )
        _expect(len(answer["choices"]) == 2, f"expected two choices in {answer}")

    async def _probe(self) -> None:
        """One of a few fixed seeded requests: the text must be the same every time, whatever else runs."""
        number = self.rng.randrange(PROBES)
        own = random.Random(number)
        words = own.choices(WORDS, k=own.choice([5, 60, 200]))
        asked = {
            "prompt": " ".join(words[: self.endpoint.prompt_words]),
            "max_tokens": 32,
            "temperature": 0.9 * (number % 3 > 0),
            "seed": number,
        }
        answer = await self._json("completions", **asked, ignore_eos=True)
        text = answer["choices"][0]["text"]
        known = self.record.probes.setdefault(number, text)
        _expect(known == text, f"seeded request {number} gave {text!r} after {known!r}")

    async def _leave_stream(self) -> None:
        await self._stream(
            "completions", leave_after=self.rng.randrange(1, 12), prompt=self._words(), max_tokens=400, ignore_eos=True
        )

    async def _leave_prefill(self) -> None:
        """Gone before the first token, during a prefill of several steps."""
        prompt = self._words(int(0.6 * min(self.endpoint.max_model_len, 4096) / 1.5))
        answer = min(64, self.endpoint.answer_tokens)
        body = {"model": self.endpoint.model, "prompt": prompt, "max_tokens": answer, "stream": True}
        request = self.session.post(f"{self.endpoint.url}/v1/completions", json=body)
        task = asyncio.ensure_future(request.__aenter__())
        await asyncio.wait([task], timeout=self.rng.uniform(0.0, 0.1))
        if task.done() and not task.cancelled() and task.exception() is None:
            task.result().close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _too_long(self) -> None:
        body = {"model": self.endpoint.model, "prompt": self._words(2 * self.endpoint.max_model_len), "max_tokens": 4}
        async with self.session.post(f"{self.endpoint.url}/v1/completions", json=body) as answer:
            _expect(answer.status == 400, f"a prompt that is too long: status {answer.status}: {await answer.text()}")

    async def _json(self, path: str, **body: Any) -> dict[str, Any]:
        body |= {"model": self.endpoint.model, "max_tokens": min(body["max_tokens"], self.endpoint.answer_tokens)}
        async with self.session.post(f"{self.endpoint.url}/v1/{path}", json=body) as answer:
            _expect(answer.status == 200, f"{path}: status {answer.status}: {(await answer.text())[:300]}")
            found: dict[str, Any] = await answer.json()
            return found

    async def _stream(self, path: str, leave_after: int | None = None, **body: Any) -> None:
        body |= {"model": self.endpoint.model, "max_tokens": min(body["max_tokens"], self.endpoint.answer_tokens)}
        body["stream"] = True
        chunks, last = 0, None
        async with self.session.post(f"{self.endpoint.url}/v1/{path}", json=body) as answer:
            _expect(answer.status == 200, f"{path}: status {answer.status}")
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                now = self.record.clock.now()
                if last is not None:
                    self.record.chunk_gap = max(self.record.chunk_gap, now - last)
                last = now
                if line.strip() == b"data: [DONE]":
                    return
                _expect(b'"error"' not in line[:20], f"{path}: {line[:300]!r}")
                chunks += 1
                if chunks == leave_after:
                    answer.close()
                    return
        raise ValueError(f"{path}: the stream ended without [DONE] after {chunks} chunks")

    def _messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._words()}]

    def _length(self) -> int:
        return self.rng.choice([1, 8, 32, 64, 128])

    def _words(self, count: int = 0) -> str:
        """Random text, half of the time after a beginning that others share: so many words, or some that fit."""
        most = count or self.endpoint.prompt_words
        count = count or self.rng.choice([1, 20, 60, 150, 300])
        shared = WORDS * 3 if self.rng.random() < 0.5 else []
        return " ".join([*shared, *self.rng.choices(WORDS, k=count)][:most])


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
