"""What the script takes from a server's words."""

from __future__ import annotations

import pytest
import start_time

from llmctl.errors import LlmctlError


def test_the_line_of_readiness_is_found() -> None:
    assert start_time.said_seconds("loading\nllmctl serve: ready in 0.3 s\ntry: curl …\n") == 0.3


def test_a_server_that_says_nothing_is_a_fault() -> None:
    with pytest.raises(LlmctlError, match="found 'loading'"):
        start_time.said_seconds("loading")
