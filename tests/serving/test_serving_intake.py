"""Requests' bodies to prompts and sampling parameters."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fixtures import make_tokenizer
from pydantic import ValidationError

from llmctl.config import ServeConfig
from llmctl.errors import CapacityError, CheckpointError, RequestError
from llmctl.serving import sampling_fields
from llmctl.serving.context import Model
from llmctl.serving.final_message import settle_prefill
from llmctl.serving.intake import Intake
from llmctl.serving.messages_api.protocol import MessagesRequest
from llmctl.serving.messages_api.translate import chat_request
from llmctl.serving.openai_errors import from_validation_error
from llmctl.serving.protocol import ChatCompletionRequest, CompletionRequest
from llmctl.serving.wire import EngineInfo
from llmctl.text.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def intake(tokenizer: Tokenizer, **defaults: Any) -> Intake:
    return Intake(
        tokenizer, tokenizer.chat_template, max_model_len=64, vocab_size=tokenizer.vocab_size, defaults=defaults
    )


def completion(tokenizer: Tokenizer, defaults: dict[str, Any] | None = None, **fields: Any) -> Any:
    made = intake(tokenizer, **(defaults or {}))
    body = CompletionRequest.model_validate_json(json.dumps({"prompt": "a", **fields}))
    params = asyncio.run(made.completion_params(body))
    return made.fit_completion(params, body, asyncio.run(made.completion_prompts(body)))


def chat(tokenizer: Tokenizer, defaults: dict[str, Any] | None = None, **fields: Any) -> Any:
    made = intake(tokenizer, **(defaults or {}))
    messages = [{"role": "user", "content": "hi"}]
    body = ChatCompletionRequest.model_validate_json(json.dumps({"messages": messages, **fields}))
    use = made.tools.use(body)
    return made.fit_chat(asyncio.run(made.chat_params(body, use)), body, asyncio.run(made.chat_prompt(body, 0)), use)


def test_only_an_assistants_message_may_lack_content(tokenizer: Tokenizer) -> None:
    chat(tokenizer, messages=[{"role": "user", "content": ""}, {"role": "assistant", "content": None}])
    for message in ({"role": "user"}, {"role": "user", "content": None}, {"role": "system"}):
        with pytest.raises(RequestError, match=r"messages\[1\]\.content: expected text") as caught:
            chat(tokenizer, messages=[{"role": "assistant"}, message])
        assert caught.value.http_status == 400


def test_every_sampling_field_arrives(tokenizer: Tokenizer) -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 7,
        "min_tokens": 2,
        "max_tokens": 5,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logprobs": 1,
        "prompt_logprobs": 0,
    }
    params = completion(tokenizer, **fields)
    for name, value in fields.items():
        assert getattr(params, name) == value, name
    params = completion(
        tokenizer, stop="x", stop_token_ids=[4], allowed_token_ids=[5, 6], bad_words=["q"], logit_bias={"3": 1}
    )
    assert params.stop == ("x",)
    assert params.stop_token_ids == (4,)
    assert params.allowed_token_ids == (5, 6)
    assert tuple(tokenizer.encode("q", add_special_tokens=False)) in params.bad_words
    assert params.logit_bias == {3: 1.0}


def test_what_is_asked_of_prompts(tokenizer: Tokenizer) -> None:
    """As many of the most likely tokens as the echo or ``prompt_logprobs`` needs, whichever is more."""
    assert completion(tokenizer, logprobs=5).prompt_logprobs is None
    assert completion(tokenizer, echo=True).prompt_logprobs is None
    assert completion(tokenizer, echo=True, logprobs=5).prompt_logprobs == 5
    assert completion(tokenizer, echo=True, logprobs=5, stream=True).prompt_logprobs == 5
    assert completion(tokenizer, echo=True, logprobs=2, prompt_logprobs=7).prompt_logprobs == 7
    assert completion(tokenizer, echo=True, logprobs=7, prompt_logprobs=0).prompt_logprobs == 7
    assert completion(tokenizer, logprobs=7, prompt_logprobs=2).prompt_logprobs == 2
    assert chat(tokenizer, prompt_logprobs=3).prompt_logprobs == 3
    for fields in ({"prompt_logprobs": 21}, {"echo": True, "logprobs": 3, "prompt_logprobs": -1}):
        with pytest.raises(RequestError, match=r"^prompt_logprobs: expected an integer at least 0 and at most 20"):
            completion(tokenizer, **fields)
    for ask in (completion, chat):
        with pytest.raises(RequestError, match=r"^prompt_logprobs: not available with stream"):
            ask(tokenizer, prompt_logprobs=0, stream=True)


def test_what_an_answer_holds_of_prompts_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_fields, "MAX_PROMPT_LOGPROBS", 2 * 30 * 3 * 6)
    fields = {"prompt": [[5] * 30] * 2, "n": 3, "echo": True}
    assert completion(tokenizer, **fields, logprobs=5).prompt_logprobs == 5
    assert completion(tokenizer, **fields).prompt_logprobs is None
    with pytest.raises(
        RequestError, match=r"at most 1080 .* found 1260 \(60 prompt tokens x 3 samples x 7\)"
    ) as caught:
        completion(tokenizer, **fields, logprobs=6)
    assert caught.value.param == "prompt_logprobs"
    monkeypatch.setattr(sampling_fields, "MAX_PROMPT_LOGPROBS", 10)
    with pytest.raises(RequestError, match="at most 10 log-probabilities"):
        chat(tokenizer, prompt_logprobs=0)


def test_null_means_the_default(tokenizer: Tokenizer) -> None:
    nulls = dict.fromkeys(["temperature", "top_p", "n", "seed", "stop", "max_tokens", "stream", "logit_bias", "stop"])
    assert completion(tokenizer, **nulls) == completion(tokenizer)


def test_lengths(tokenizer: Tokenizer) -> None:
    assert completion(tokenizer).max_tokens == 16
    prompt_tokens = len(tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    assert chat(tokenizer).max_tokens == 64 - prompt_tokens
    assert chat(tokenizer, max_tokens=3).max_tokens == 3
    assert chat(tokenizer, max_tokens=3, max_completion_tokens=4).max_tokens == 4
    with pytest.raises(CapacityError) as caught:
        chat(tokenizer, max_completion_tokens=64)
    assert caught.value.param == "max_completion_tokens"
    with pytest.raises(CapacityError) as caught:
        completion(tokenizer, prompt=[5] * 64, max_tokens=None)
    assert caught.value.param == "max_tokens"
    with pytest.raises(CapacityError) as caught:
        completion(tokenizer, prompt=[5] * 65)
    assert caught.value.param == "prompt"
    assert completion(tokenizer, prompt=[5] * 64, max_tokens=0).max_tokens == 0


def test_a_length_of_minus_one_is_no_limit(tokenizer: Tokenizer) -> None:
    assert completion(tokenizer, prompt=[5] * 60, max_tokens=-1).max_tokens == 4
    assert chat(tokenizer, max_completion_tokens=-1) == chat(tokenizer)
    assert chat(tokenizer, {"max_tokens": 5}, max_tokens=-1) == chat(tokenizer)
    with pytest.raises(RequestError, match="max_tokens: expected an integer at least 0, found -2"):
        completion(tokenizer, max_tokens=-2)


def test_parts_of_text(tokenizer: Tokenizer) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "b"}, {"type": "text", "text": ""}]
    body = {"messages": [{"role": "assistant", "content": [*parts, {"type": "output_text", "text": "c"}]}]}
    text = intake(tokenizer).render_chat(ChatCompletionRequest.model_validate_json(json.dumps(body)))
    assert "<|im_start|>assistant\na\nb\n\nc<|im_end|>" in text
    for wrong, said in (
        ({"type": "refusal", "text": "a"}, "a part of type 'refusal' has no 'refusal'"),
        ({"type": "text", "refusal": "a"}, "a part of type 'text' has no 'text'"),
        ({"type": "image_url"}, "only parts of type 'text' are supported, found 'image_url'"),
    ):
        with pytest.raises(RequestError, match=said):
            chat(tokenizer, messages=[{"role": "user", "content": [wrong]}])


def test_roles_are_openais(tokenizer: Tokenizer) -> None:
    for role in ("system", "developer", "user", "assistant", "tool", "function"):
        chat(tokenizer, messages=[{"role": role, "content": "a"}])
    with pytest.raises(ValidationError, match=r"messages\.0\.role"):
        chat(tokenizer, messages=[{"role": "emperor", "content": "a"}])


def test_the_default_length_is_the_chats(tokenizer: Tokenizer) -> None:
    assert chat(tokenizer, {"max_tokens": 5}).max_tokens == 5
    assert chat(tokenizer, {"max_tokens": 5}, max_tokens=7, min_tokens=6).max_tokens == 7
    assert chat(tokenizer, {"max_tokens": 10**6}).max_tokens == chat(tokenizer).max_tokens
    assert completion(tokenizer, {"max_tokens": 5}).max_tokens == 16


def test_model_defaults_apply_unless_overridden(tokenizer: Tokenizer) -> None:
    defaults = {"temperature": 0.25, "top_k": 7}
    assert completion(tokenizer, defaults).temperature == 0.25
    assert completion(tokenizer, defaults, temperature=0).temperature == 0
    assert completion(tokenizer, defaults, temperature=0).top_k == 7


@pytest.mark.parametrize("name", ["n", "seed", "min_tokens", "logprobs", "prompt_logprobs", "max_tokens", "top_k"])
@pytest.mark.parametrize("digits", [400, 4299])
def test_integers_beyond_a_floats_range_are_refused_in_one_short_line(
    tokenizer: Tokenizer, name: str, digits: int
) -> None:
    with pytest.raises(RequestError) as caught:
        completion(tokenizer, **{name: -int("9" * digits)})
    assert caught.value.param == name
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt"])
def test_template_variables_that_are_fields_are_refused(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(RequestError, match=f"found '{name}'") as caught:
        chat(tokenizer, chat_template_kwargs={name: []})
    assert (caught.value.param, caught.value.fix) == ("chat_template_kwargs", f"set the request's field '{name}'")


@pytest.mark.parametrize("name", ["self", "kwargs", "class", "a b", ""])
def test_any_other_template_variable_is_the_templates(tokenizer: Tokenizer, name: str) -> None:
    assert chat(tokenizer, chat_template_kwargs={name: []}) == chat(tokenizer)


def test_the_sequences_that_a_request_asks_for(tokenizer: Tokenizer) -> None:
    def count(**fields: Any) -> int:
        return intake(tokenizer).num_sequences(CompletionRequest.model_validate_json(json.dumps(fields)))

    assert [count(prompt=p) for p in ("a", [5, 6], ["a", "b"], [[5], [6], [7]], [])] == [1, 1, 2, 3, 0]
    assert count(prompt=[[5]] * 10_000, n=128) == 1_280_000
    assert count(prompt="a", n=None) == 1
    with pytest.raises(RequestError, match="n: expected an integer at least 1 and at most 128, found 129"):
        count(prompt="a", n=129)


def test_a_huge_top_k_means_all(tokenizer: Tokenizer) -> None:
    assert completion(tokenizer, top_k=2**63 - 1).top_k == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}], "tools": [TOOL]}, "functions"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"function_call": "auto"}, "function_call"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 100}, "logprobs"),
        ({"bad_words": [""]}, "bad_words"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(tokenizer, **fields)
    assert caught.value.param == param


def test_neutral_values_of_what_cannot_be_honoured_are_fine(tokenizer: Tokenizer) -> None:
    chat(tokenizer, tool_choice="none", response_format={"type": "text"}, use_beam_search=False, functions=None)
    completion(tokenizer, best_of=1, suffix="", n=1)


TRIMS = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}!{% endif %}"
KEEPS = TRIMS.replace(" | trim", "")


def rendered(tokenizer: Tokenizer, template: str, *contents: str | None, **fields: Any) -> str:
    made = Intake(tokenizer, None, max_model_len=64, vocab_size=9, defaults={}, trust_request_template=True)
    messages = [{"role": "assistant", "content": content} for content in contents]
    body = {"messages": messages, "chat_template": template, **fields}
    return made.render_chat(ChatCompletionRequest.model_validate_json(json.dumps(body)))


@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": False}])
def test_the_final_message_is_continued_where_its_text_ends(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    fields = {"continue_final_message": True, **fields}
    for last in ("b", "b ] ", "CONTINUE_FINAL_MESSAGE_TAG x", "b\n"):
        assert rendered(tokenizer, KEEPS, "a", last, **fields) == f"[a][{last}"
        assert rendered(tokenizer, TRIMS, "a", last, **fields) == f"[a][{last.rstrip()}"
    for template, last, said in ((KEEPS, "", "is empty"), (KEEPS, None, "is empty"), ("x", "b", "leaves the last")):
        with pytest.raises(RequestError, match=said):
            rendered(tokenizer, template, last, **fields)


@pytest.mark.parametrize(
    ("fields", "last", "goes_on"),
    [
        ({}, {"content": "b"}, True),
        ({}, {"content": [{"type": "text", "text": ""}, {"type": "refusal", "refusal": "b"}]}, True),
        ({}, {"content": [{"type": "text", "text": ""}]}, False),
        ({}, {"content": ""}, False),
        ({}, {"content": None}, False),
        ({}, {"content": "b", "tool_calls": [{"function": {"name": "f"}}]}, False),
        ({}, {"content": "b", "function_call": {"name": "f"}}, False),
        ({}, {"role": "user", "content": "b"}, False),
        ({"continue_final_message": False}, {"content": "b"}, False),
        ({"add_generation_prompt": True}, {"content": "b"}, False),
        ({"add_generation_prompt": False}, {"content": "b"}, False),
    ],
)
def test_a_last_message_of_the_assistant_is_continued_where_nothing_says_otherwise(
    fields: dict[str, Any], last: dict[str, Any], goes_on: bool
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **last}]
    for prefills in (True, False):
        body = ChatCompletionRequest.model_validate({"messages": messages, **fields})
        settle_prefill(body, prefills=prefills)
        assert body.continue_final_message == (goes_on and prefills)


def test_a_template_of_a_request_that_is_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"chat_template: .*line 1") as caught:
        rendered(tokenizer, "{% for %}", "a")
    assert (caught.value.param, caught.value.http_status) == ("chat_template", 400)


def test_no_chat_template_is_refused_not_guessed(tokenizer: Tokenizer) -> None:
    made = Intake(tokenizer, None, max_model_len=64, vocab_size=tokenizer.vocab_size, defaults={})
    body = ChatCompletionRequest.model_validate_json('{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(RequestError, match="no chat template"):
        made.render_chat(body)


def test_a_template_file_overrides_the_models_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = (64, 16, 8, tokenizer.vocab_size, 32, 0, 0)
    info = EngineInfo("m", "llama", "reference", "none", "float32", *sizes, "float32", 2, 64)
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ eos_token }}")
    body = ChatCompletionRequest.model_validate_json('{"messages": [{"role": "user", "content": "hi"}]}')
    assert (
        Model.from_folder("m", tmp_path, tokenizer, info, ServeConfig(chat_template=str(path))).intake.render_chat(body)
        == "[hi]<|im_end|>"
    )
    assert "<|im_start|>user" in Model.from_folder("m", tmp_path, tokenizer, info, ServeConfig()).intake.render_chat(
        body
    )
    path.write_text("{% for %}")
    with pytest.raises(CheckpointError, match="chat template: line 1"):
        Model.from_folder("m", tmp_path, tokenizer, info, ServeConfig(chat_template=str(path)))
    with pytest.raises(CheckpointError, match="--chat-template"):
        Model.from_folder("m", tmp_path, tokenizer, info, ServeConfig(chat_template=str(tmp_path / "gone")))


def test_of_many_wrong_items_the_first_is_named() -> None:
    """One problem is made and told, however many there are."""
    cases: dict[str, Any] = {
        "logit_bias": {"7": True, **{str(i): "x" for i in range(9000)}},
        "stop_token_ids": ["x"] * 9000,
        "bad_words": [4] * 9000,
    }
    for name, value in cases.items():
        with pytest.raises(ValidationError) as caught:
            CompletionRequest.model_validate_json(json.dumps({"prompt": "x", name: value}))
        assert caught.value.error_count() == 1
        assert str(from_validation_error(caught.value)).startswith(name)
    for prompt, most in (([["x"]] * 9000, 4), ([5] * 9000 + ["x"], 4)):
        with pytest.raises(ValidationError) as caught:
            CompletionRequest.model_validate_json(json.dumps({"prompt": prompt}))
        assert caught.value.error_count() <= most
        assert str(from_validation_error(caught.value)) == (
            "prompt: expected a string, a list of token ids (integers >= 0), or a list of either"
        )


def test_a_response_format_beside_calls_that_must_be_made_is_of_no_text(tokenizer: Tokenizer) -> None:
    made = intake(tokenizer)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

    def grammar(**fields: Any) -> Any:
        asked = {"messages": [{"role": "user", "content": "a"}], "tools": tools, "tool_choice": "required", **fields}
        body = ChatCompletionRequest.model_validate(asked)
        return asyncio.run(made.chat_params(body, made.tools.use(body))).grammar

    assert grammar() is not None
    assert grammar(response_format={"type": "json_object"}) == grammar()
    with pytest.raises(RequestError, match="expected one description of the output, found regex and tool_choice"):
        grammar(regex="a")


def test_an_api_may_ask_for_more_tokens_than_there_is_room_for(tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1000}
    with pytest.raises(CapacityError):
        chat(tokenizer, **asked)
    body, made = chat_request(MessagesRequest.model_validate(asked)), intake(tokenizer)
    prompt = asyncio.run(made.chat_prompt(body, 0))
    use = made.tools.use(body)
    params = made.fit_chat(asyncio.run(made.chat_params(body, use)), body, prompt, use)
    assert params.max_tokens == made.max_model_len - len(prompt.token_ids)
