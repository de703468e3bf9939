"""Which files of a Hugging Face folder hold what: config, safetensors shards, the tokenizer's files."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import CheckpointError, ModelNotFoundError

AUX_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT calls an adapter's settings."""
QUANTIZATION_FILES = ("quantize_config.json", "hf_quant_config.json")
"""What holds the quantization settings where config.json does not: GPTQ's, ModelOpt's."""
_NAMED_KEYS = ("quantization_config", "compression_config")
QUANTIZATION_KEYS = (*_NAMED_KEYS, "quantization")
"""What holds them in config.json: all methods', compressed-tensors' of old, MLX's."""
_GENERATION = "generation_config.json"
_MAX_DEPTH = 64  # of nested JSON; no config needs ten, and what walks one must not run out of stack


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable, not JSON, not an object, or nested too deeply.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from error
    except RecursionError:
        document = None
    if document is None or _deeper_than(document, _MAX_DEPTH):
        raise CheckpointError(f"{path}: expected a JSON object nested at most {_MAX_DEPTH} deep")
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _deeper_than(document: Any, depth: int) -> bool:
    level = [document]
    for _ in range(depth):
        values = (value.values() if isinstance(value, dict) else value for value in level)
        level = [inner for group in values for inner in group if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def aux_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files, chat template and generation config that are present, by name."""
    return {name: folder / name for name in AUX_NAMES if (folder / name).is_file()}


def with_eos(aux: Mapping[str, Path], config: Mapping[str, Any], where: str) -> dict[str, Path | bytes]:
    """``aux`` with config.json's ``eos_token_id`` in its generation config, where that names none.

    Only the generation config goes where the tokenizer goes: into engines and quantized checkpoints.

    Args:
        where: config.json, for messages.

    Raises:
        CheckpointError: ids that are not whole numbers; an unreadable generation config.
    """
    stored = read_json(aux[_GENERATION]) if _GENERATION in aux else {}
    ends = config.get("eos_token_id")
    if ends is None or stored.get("eos_token_id") is not None:
        return dict(aux)
    if not all(type(i) is int and i >= 0 for i in (ends if isinstance(ends, list) else [ends])):
        raise CheckpointError(f"{where}: eos_token_id: expected whole numbers, found {reprlib.repr(ends)}")
    made = json.dumps({**stored, "eos_token_id": ends}, indent=2) + "\n"
    return {**aux, _GENERATION: made.encode()}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
        ModelNotFoundError: the folder has none.
        CheckpointError: unreadable or without ``model_type``.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise ModelNotFoundError(
            f"{folder}: an adapter, not a model",
            fix=f"merge it: llmctl merge BASE {folder} --output DIR; or serve it beside its base: "
            f"llmctl serve BASE --enable-lora --lora-modules NAME={folder}",
        )
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder}: not a Hugging Face checkpoint: no config.json", fix="name a checkpoint folder or a .gguf file"
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: no model_type")
    return config


def quantization_config(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    """The raw quantization settings and the file they stand in, or None for a dense checkpoint.

    Raises:
        CheckpointError: an unreadable file of ``QUANTIZATION_FILES``.
    """
    for key in _NAMED_KEYS:
        inner = config.get(key)
        if isinstance(inner, dict):
            return _named(inner, config), str(folder / "config.json")
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            found = read_json(folder / name)
            modelopt = isinstance(found.get("quantization"), dict)
            return ({"quant_method": "modelopt", **found["quantization"]} if modelopt else found), str(folder / name)
    return (_named({}, config), str(folder / "config.json")) if _is_mlx(config) else None


def _named(settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Settings with the method that MLX, alone, names nowhere."""
    return {"quant_method": "mlx", **settings} if _is_mlx(config) else settings


def _is_mlx(config: dict[str, Any]) -> bool:
    return isinstance(config.get("quantization"), dict)


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint: those of the index, else the only one.

    Raises:
        CheckpointError: none, a missing shard, pickle files only, or several files without an index.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    preferred = folder / "model.safetensors.index.json"
    if preferred in indexes or len(indexes) == 1:
        return _indexed(preferred if preferred in indexes else indexes[0])
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if len(files) == 1:
        return files
    if files:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder}: several safetensors files and no model.safetensors.index.json: {names}")
    raise _no_safetensors(folder)


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: shard '{outside[0]}' is not a file name in this folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent}: missing shard {missing[0]} ({len(missing)} of {len(names)} missing)")
    return [index.parent / name for name in names]


def _no_safetensors(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder}: only pickle weights ({pickles[0]}), which can run code when read, and no safetensors",
            fix="convert it once with transformers: from_pretrained(...).save_pretrained(..., safe_serialization=True)",
        )
    return CheckpointError(f"{folder}: no safetensors files")
