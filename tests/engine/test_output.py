"""OutputProcessor: text, stop strings, log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_level

from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.output import OutputProcessor, TextOutput, merge_outputs
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import TokenLogprobs

TOKENIZER = byte_level()
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
EOS = TOKENIZER.token_to_id("</s>") or 0


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def run(
    ids: list[int], params: SamplingParams, reason: FinishReason | None = LENGTH, at_once: int = 1
) -> tuple[list[TextOutput], list[str]]:
    """Feed tokens, ``at_once`` a step; the last step carries ``reason``."""
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", ids_of("The "), params)
    outputs: list[TextOutput] = []
    aborts: list[str] = []
    for i in range(0, len(ids), at_once):
        last = i + at_once >= len(ids)
        output = TokenOutput("r", tuple(ids[i : i + at_once]), finish_reason=reason if last else None)
        processed = processor.process([output])
        outputs += processed.outputs
        aborts += processed.aborts
    return outputs, aborts


def joined(outputs: list[TextOutput]) -> str:
    return "".join(o.text for o in outputs)


def test_text_arrives_in_whole_characters() -> None:
    ids = ids_of("😀世")
    assert len(ids) > 2
    outputs, aborts = run(ids, SamplingParams())
    assert joined(outputs) == "😀世"
    assert all("\ufffd" not in o.text for o in outputs)
    assert [o.num_output_tokens for o in outputs] == list(range(1, len(ids) + 1))
    assert outputs[-1].finish_reason is LENGTH
    assert aborts == []


def test_a_character_cut_off_by_the_end_is_marked() -> None:
    outputs, _ = run(ids_of("a😀")[:-1], SamplingParams())
    assert joined(outputs) == "a\ufffd"


def test_the_token_that_ends_is_not_shown_unless_asked_for() -> None:
    ids = [*ids_of("fox"), EOS]
    for skip in (True, False):
        outputs, _ = run(ids, SamplingParams(skip_special_tokens=skip), STOP)
        assert joined(outputs) == "fox"
        assert outputs[-1].token_ids == (EOS,)
    shown, _ = run(ids, SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), STOP)
    assert joined(shown) == "fox</s>"


@pytest.mark.parametrize(("include", "text"), [(False, "The dog "), (True, "The dog sleeps")])
@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_a_stop_string_ends_the_text_and_asks_for_an_abort(include: bool, text: str, at_once: int) -> None:
    params = SamplingParams(stop=("never", "sleeps"), include_stop_str_in_output=include)
    outputs, aborts = run(ids_of("The dog sleeps; the fox does not."), params, None, at_once)
    assert joined(outputs) == text
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (STOP, "sleeps")
    assert aborts == ["r"]
    assert sum(len(o.token_ids) for o in outputs) == len(ids_of("The dog sleeps"))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("include", "text"), [(False, "The dog "), (True, "The dog <s>")])
@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_a_stop_string_that_is_a_special_token_is_found_in_the_text_or_not(
    skip: bool, include: bool, text: str, at_once: int
) -> None:
    special = TOKENIZER.token_to_id("<s>")
    assert special in TOKENIZER.special_token_ids
    ids = [*ids_of("The dog "), special, *ids_of("sleeps")]
    params = SamplingParams(stop=("dog s", "<s>"), skip_special_tokens=skip, include_stop_str_in_output=include)
    outputs, aborts = run(ids, params, None, at_once)
    assert joined(outputs) == text
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason, aborts) == (STOP, "<s>", ["r"])
    assert sum(len(o.token_ids) for o in outputs) == ids.index(special) + 1
    later, _ = run(ids, replace(params, min_tokens=len(ids) - 1), None, at_once)
    assert later[-1].finish_reason is None


def test_an_ordinary_token_is_found_by_its_text_only() -> None:
    outputs, _ = run(ids_of("a foxes"), SamplingParams(stop=("fox",)), None)
    assert joined(outputs) == "a "


def test_a_stop_string_in_the_last_token_needs_no_abort() -> None:
    outputs, aborts = run(ids_of("a fox"), SamplingParams(stop=("fox",)), LENGTH)
    assert outputs[-1].finish_reason is STOP
    assert outputs[-1].stop_reason == "fox"
    assert aborts == []


def test_text_held_back_comes_out_at_the_end() -> None:
    outputs, _ = run(ids_of("the fo"), SamplingParams(stop=("fox",)))
    assert joined(outputs) == "the fo"
    assert outputs[-1].stop_reason is None


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = ids_of("dog. dog. dog.")
    first = len(ids_of("dog."))
    outputs, _ = run(ids, SamplingParams(stop=("dog",), min_tokens=first), None)
    assert joined(outputs) == "dog. "


def test_outputs_of_dropped_and_finished_requests_are_passed_over() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("a", [], SamplingParams())
    processor.drop(["a", "b"])
    assert processor.process([TokenOutput("a", (5,))]).outputs == []
    processor.add("a", [], SamplingParams())
    processor.process([TokenOutput("a", (5,), finish_reason=LENGTH)])
    assert processor.process([TokenOutput("a", (5,))]).outputs == []


def test_logprobs_come_with_text_and_bytes() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add("r", [], SamplingParams(logprobs=2))
    half = ids_of("😀")[0]
    fox = ids_of(" fox")[0]
    entry = TokenLogprobs(-1.5, 2, (half, fox), (-0.5, -1.5))
    (output,) = processor.process([TokenOutput("r", (fox,), (entry,))]).outputs
    assert output.logprobs is not None
    (position,) = output.logprobs
    assert (position.token.text, position.token.data, position.token.rank) == (" fox", b" fox", 2)
    assert [t.logprob for t in position.top] == [-0.5, -1.5]
    assert position.top[0].text == "\ufffd"
    assert "😀".encode().startswith(position.top[0].data)


@given(
    text=st.text(st.sampled_from("ab 😀世"), max_size=12),
    stop=st.text(st.sampled_from("ab 世"), min_size=1, max_size=3),
)
def test_text_before_a_stop_is_what_precedes_it(text: str, stop: str) -> None:
    ids = ids_of(text)
    if not ids:
        return
    outputs, _ = run(ids, SamplingParams(stop=(stop,)))
    at = text.find(stop)
    assert joined(outputs) == (text if at < 0 else text[:at])
    assert merge_outputs(outputs).text == joined(outputs)
    assert merge_outputs(outputs).token_ids == tuple(ids)[: outputs[-1].num_output_tokens]
