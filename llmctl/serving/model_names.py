"""What a served model is called in the API."""

from __future__ import annotations

from pathlib import Path

from llmctl.artifact.engine_source import MANIFEST_NAME, source_name
from llmctl.config import ServeConfig


def served_names(config: ServeConfig) -> tuple[str, ...]:
    """The model's names in the API."""
    return config.served_model_name or (default_model_name(config.model),)


def default_model_name(model: str) -> str:
    """The served name of ``--model``: an engine's source model, a folder's or file's own name, else as given."""
    path = Path(model)
    if (path / MANIFEST_NAME).is_file():
        name = source_name(path)
        if name is None:  # in the loader's words, why not
            from llmctl.artifact.loader import read_manifest

            return read_manifest(path).source.name
        return name
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    return model
