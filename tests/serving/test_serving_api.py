"""What the endpoints that generate do before anything is generated."""

from __future__ import annotations

import json
import logging

import pytest

from llmctl.serving.body import parsed
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import CompletionRequest


def test_unknown_fields_are_named_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A long one not in part, which might be that of a key; none makes a line of its own."""
    names = ["best", "a\nINFO forged: line", "x" * 81]
    data = json.dumps({"prompt": "x", **dict.fromkeys(names, 1)}).encode()
    with caplog.at_level(logging.DEBUG, "llmctl.serving"):
        parsed(data, Outline(data), CompletionRequest)
    assert [r.getMessage() for r in caplog.records] == [
        "ignored 3 unknown request fields: best, [19 characters], [81 characters]"
    ]
