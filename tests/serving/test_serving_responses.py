"""Bodies of responses: logprobs' shapes, usage, events."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fixtures import LOOP_TEXT, make_tokenizer

from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.output import OutputProcessor, TextOutput
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import TokenLogprobs
from llmctl.serving.generation import Generation
from llmctl.serving.intake import Prompt
from llmctl.serving.responses import (
    CompletionLogprobs,
    Envelope,
    UsageCount,
    chat_logprobs,
    event,
    prompt_logprobs,
    usage_member,
)
from llmctl.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def outputs(tokenizer: Tokenizer, steps: list[TokenOutput], params: SamplingParams) -> list[TextOutput]:
    processor = OutputProcessor(tokenizer)
    processor.add("id", [5], params)
    return [output for step in steps for output in processor.process([step]).outputs]


def test_events_are_one_line_of_json() -> None:
    data = event({"text": 'a\nb "é" 🎉'})
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    assert json.loads(data[6:]) == {"text": 'a\nb "é" 🎉'}


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 3}])
def test_a_chunk_is_the_event_of_its_body(usage: dict[str, int] | None) -> None:
    envelope = Envelope.new("cmpl", "text_completion", 'a "model"')
    choice = {"index": 0, "text": 'é"\n', "finish_reason": None}
    assert envelope.chunk(choice) == event(envelope.body([choice]))
    assert envelope.chunk(choice, usage_member(usage)) == event(envelope.body([choice], usage=usage))


def test_characters_are_never_split_whatever_the_batching(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(LOOP_TEXT * 3, add_special_tokens=False)
    for size in range(1, 6):
        cuts = [ids[i : i + size] for i in range(0, len(ids), size)]
        steps = [TokenOutput("id", tuple(cut)) for cut in cuts[:-1]]
        steps.append(TokenOutput("id", tuple(cuts[-1]), finish_reason=FinishReason.LENGTH))
        made = outputs(tokenizer, steps, SamplingParams())
        generation = Generation(1, lambda _: None)
        for output in made:
            assert "\ufffd" not in output.text
            generation.push(0, output)
        assert "".join(output.text for output in made) == LOOP_TEXT * 3
        assert generation.done


def test_logprobs_of_parts_of_characters(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("é", add_special_tokens=False)
    entries = (TokenLogprobs(-0.5, 1, (first, second), (-0.5, -math.inf)),)
    (output,) = outputs(tokenizer, [TokenOutput("id", (first,), entries)], SamplingParams(logprobs=2))
    chat = chat_logprobs(output)
    assert chat is not None
    (entry,) = chat["content"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("bytes:\\xc3", [0xC3], -0.5)
    assert [t["logprob"] for t in entry["top_logprobs"]] == [-0.5, -9999.0]
    body = CompletionLogprobs().body(output)
    assert body is not None
    assert body["top_logprobs"] == [{"bytes:\\xc3": -0.5, "bytes:\\xa9": -9999.0}]
    json.loads(msgspec.json.encode(body))


def test_text_offsets_run_on_and_cover_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox sits", add_special_tokens=False)
    steps = [TokenOutput("id", (i,), (TokenLogprobs(-1.0, 1),)) for i in ids]
    logprobs = CompletionLogprobs()
    bodies = [logprobs.body(output) for output in outputs(tokenizer, steps, SamplingParams(logprobs=0))]
    offset = 0
    for body in bodies:
        assert body is not None
        assert body["text_offset"] == [offset]
        offset += len(body["tokens"][0])
    assert offset == len("the fox sits")


def test_no_logprobs_are_null(tokenizer: Tokenizer) -> None:
    (output,) = outputs(tokenizer, [TokenOutput("id", (5,))], SamplingParams())
    assert chat_logprobs(output) is None
    assert CompletionLogprobs().body(output) is None


def test_echoed_and_prompt_logprobs(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc", add_special_tokens=False)
    scores = np.arange(1, len(ids), dtype=np.float32) * -1
    step = TokenOutput("id", (ids[0],), (TokenLogprobs(-9.0, 1),), prompt_scores=scores)
    (output,) = outputs(tokenizer, [step], SamplingParams(logprobs=0, prompt_logprobs=0))
    prompt = Prompt(ids, "abc")
    body = CompletionLogprobs().echoed(tokenizer, prompt, output)
    assert body is not None
    assert body["token_logprobs"] == [None, *scores.tolist(), -9.0]
    assert body["top_logprobs"][0] is None
    entries = prompt_logprobs(tokenizer, prompt, scores)
    assert entries is not None
    assert entries[0] is None
    assert [entry[str(i)]["logprob"] for entry, i in zip(entries[1:], ids[1:], strict=True)] == scores.tolist()


def test_usage_counts_a_prompt_once(tokenizer: Tokenizer) -> None:
    usage = UsageCount(10)
    for index in range(4):  # two prompts of two samples
        (output,) = outputs(tokenizer, [TokenOutput("id", (5, 6), num_cached_tokens=3 + index)], SamplingParams())
        usage.count(index, output)
    assert usage.body(samples=2) == {
        "prompt_tokens": 10,
        "completion_tokens": 8,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 3 + 5},
    }
