"""float16 is not computed in where a family's activations leave its range."""

from __future__ import annotations

import logging

import pytest
from family_models import family_model

from llmctl.config import BuildConfig
from llmctl.errors import UsageError
from llmctl.targets.table import parse_target


def config(dtype: str, target: str) -> BuildConfig:
    return BuildConfig(model="m", target=target, output="e", dtype=dtype)


@pytest.mark.parametrize("target", ["cuda:sm_90", "reference"])
def test_float16_is_refused_when_asked_for(target: str) -> None:
    with pytest.raises(UsageError, match=r"--dtype: expected bfloat16 or float32 for gemma2 .* found 'float16'"):
        parse_target(target).options(config("float16", target), family_model("gemma2").graph, "float16")
    parse_target(target).options(config("float16", target), family_model("llama").graph, "float16")


def test_a_float16_checkpoint_becomes_bfloat16_aloud(caplog: pytest.LogCaptureFixture) -> None:
    target = parse_target("cuda:sm_90")
    with caplog.at_level(logging.WARNING):
        assert target.options(config("auto", "cuda"), family_model("llama").graph, "float16").dtype == "float16"
        assert not caplog.text
        assert target.options(config("auto", "cuda"), family_model("gemma2").graph, "float16").dtype == "bfloat16"
    assert "activations of gemma2 models leave its range: computing in bfloat16" in caplog.text
