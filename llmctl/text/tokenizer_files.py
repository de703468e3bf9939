"""The files that a tokenizer is read from, as text and JSON; imports no tokenizer."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import CheckpointError

FILE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def files_of(folder: Path) -> dict[str, Path | bytes]:
    """Those that a folder has, by name."""
    return {name: folder / name for name in FILE_NAMES if (folder / name).is_file()}


def line_of(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())


def text_of(files: Mapping[str, Path | bytes], name: str, where: str) -> str:
    """The text of a file.

    Raises:
        CheckpointError: it cannot be read, or is not UTF-8. ``where`` names the folder.
    """
    source = files[name]
    try:
        return (source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{where}: cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: {name} is not UTF-8 text") from error


def json_of(files: Mapping[str, Path | bytes], name: str, where: str) -> dict[str, Any]:
    """A JSON object file; {} when absent.

    Raises:
        CheckpointError: as ``text_of``, or it is no JSON object.
    """
    if name not in files:
        return {}
    try:
        loaded = json.loads(text_of(files, name, where))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else line_of(error)
        raise CheckpointError(f"{where}: {name} is not valid JSON: {reason}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where}: {name}: expected a JSON object, found {type(loaded).__name__}")
    return loaded


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens; each is a string, or an object with its ``content``."""
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def generation_eos(config: Mapping[str, Any], where: str) -> frozenset[int]:
    """The ``eos_token_id`` of a generation_config, one or several.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        found = reprlib.repr(value)
        raise CheckpointError(f"{where}: generation_config.json: eos_token_id: expected integers, found {found}")
    return frozenset(ids)
