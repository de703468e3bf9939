"""What is said about an answer: how much, how fast, and whether it is whole."""

from __future__ import annotations

import pytest

from llmctl.cli.chat.answers import Answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            Answer("x", completion_tokens=11, prompt_tokens=7, finish_reason="stop", started=0.0, first=0.5, last=2.5),
            "11 tokens, 5.0 tok/s, first after 0.50 s, prompt 7 tokens",
        ),
        (
            Answer("x", pieces=3, finish_reason="stop", first=1.0, last=2.0),
            "about 3 tokens, 2.0 tok/s, first after 1.00 s",
        ),
        (Answer("x", completion_tokens=1, finish_reason="stop", first=1.0, last=1.0), "1 tokens, first after 1.00 s"),
        (Answer("x", completion_tokens=5, finish_reason="stop", first=1.0, last=1.0), "5 tokens, first after 1.00 s"),
        (Answer("x", pieces=2, first=1.0, last=1.5), "about 2 tokens, 2.0 tok/s, first after 1.00 s, unfinished"),
    ],
)
def test_tokens_a_second_are_of_those_after_the_first(answer: Answer, said: str) -> None:
    assert answer.speed_line() == said
