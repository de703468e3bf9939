"""What a served model is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.errors import EngineLoadError
from llmctl.serving.model_names import default_model_name


def test_default_model_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    file = tmp_path / "tiny.Q4_1.gguf"
    file.touch()
    assert default_model_name(str(folder)) == default_model_name(f"{folder}/") == "my-model"
    assert default_model_name(str(file)) == "tiny.Q4_1"
    assert default_model_name("org/name") == "org/name"
    assert default_model_name("demo:smollm2-135m") == "demo:smollm2-135m"


def test_an_engine_is_called_as_its_source(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"graph": [1], "source": {"name": "of-the-source", "files": 3}}')
    assert default_model_name(str(tmp_path)) == "of-the-source"


@pytest.mark.parametrize("content", ["{", "[]", '{"source": {"name": 5}}', '{"source": "m"}', "[" * 5000])
def test_a_manifest_that_names_none_is_refused_in_the_loaders_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(EngineLoadError, match=r"engine\.json"):
        default_model_name(str(tmp_path))
