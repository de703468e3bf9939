"""What a served model is called."""

from __future__ import annotations

from pathlib import Path

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
