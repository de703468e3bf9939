"""Bodies of responses: usage, events, whole characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixtures import LOOP_TEXT, make_tokenizer

from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.output import OutputProcessor, TextOutput
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.serving.generation import Generation
from llmctl.serving.responses import (
    Envelope,
    UsageCount,
    event,
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
