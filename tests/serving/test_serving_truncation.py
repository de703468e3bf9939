"""``truncation: "auto"``: which items are left out of a response's input."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fixtures import make_tokenizer

from llmctl.errors import RequestError
from llmctl.serving.intake import Intake
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.truncation import truncated
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.tokenizer import Tokenizer

CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "done"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.from_folder(folder)


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
    asked = ResponsesRequest(input=input_, truncation="auto", max_output_tokens=3)
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
    asked = ResponsesRequest(input=[_said("a", "assistant"), _said("b")], truncation="auto")
    if kept:
        assert len(asyncio.run(truncated(asked, intake, 100)).messages) == kept
    else:
        with pytest.raises(RequestError, match="no"):
            asyncio.run(truncated(asked, intake, 100))
