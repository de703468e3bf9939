"""Where the sampling parameters of requests that bring none come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.errors import UsageError
from llmctl.serving.sampling_defaults import given_defaults, sampling_defaults

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}, {"temperature": 0.6, "top_p": 0.9}),
    ({"top_k": 5, "min_p": 0.1, "max_new_tokens": 7}, {"top_k": 5, "min_p": 0.1, "max_tokens": 7}),
    ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"temperature": None}, {}),
]
BAD = [({"temperature": -1}, "temperature: expected"), ({"top_p": "high"}, "top_p: expected"), ([], "found list")]


@pytest.mark.parametrize(("document", "expected"), CASES)
def test_the_models_own_and_a_files(document: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(document))
    own = sampling_defaults("auto", tmp_path)
    assert own.values == expected
    assert str(own).endswith("(the model's generation_config.json)" if expected else "OpenAI's defaults")
    for choice in (str(path), str(tmp_path)):
        assert sampling_defaults(choice, Path("nowhere")).values == expected
    assert str(sampling_defaults("vllm", tmp_path)) == "OpenAI's defaults"


@pytest.mark.parametrize(("document", "said"), BAD)
def test_out_of_range(document: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(document))
    assert sampling_defaults("auto", tmp_path).values == {}
    assert said in caplog.text
    with pytest.raises(UsageError, match=said):
        given_defaults(str(tmp_path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert sampling_defaults("auto", tmp_path).values == {}
    with pytest.raises(UsageError, match=r"--generation-config .*: No such file"):
        given_defaults(str(tmp_path))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UsageError, match=r"x\.json: Expecting property name"):
        given_defaults(str(tmp_path / "x.json"))
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    assert sampling_defaults("auto", tmp_path).values == {}
    with pytest.raises(UsageError, match="nested too deeply"):
        given_defaults(str(tmp_path))
