"""Open a checkpoint, whatever it is: a Hugging Face folder (dense, AWQ, GPTQ; one file or shards) or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from llmctl.checkpoint import hf_folder
from llmctl.checkpoint.quant_config import parse_quantization_config
from llmctl.checkpoint.reader import Checkpoint, SafetensorsSource
from llmctl.checkpoint.text_config import is_multimodal, text_model_config
from llmctl.errors import ModelNotFoundError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder or a .gguf file; only headers and small files are read.

    Raises:
        ModelNotFoundError: nothing there, or not a checkpoint.
        CheckpointError: damaged, incomplete, or pickle weights only.
        UnsupportedModelError: a quantization method or GGUF architecture this version cannot read.
    """
    if path.is_file() and path.suffix == ".gguf":
        from llmctl.checkpoint.gguf_file import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}: no such checkpoint folder or .gguf file")
    return _open_folder(path)


def _open_folder(folder: Path) -> Checkpoint:
    stored = hf_folder.read_config(folder)
    where = str(folder / "config.json")
    config = text_model_config(stored, where)
    raw = hf_folder.quantization_config(folder, config)
    quantization = parse_quantization_config(*raw) if raw else None
    shards = hf_folder.shard_paths(folder)
    aux = hf_folder.aux_files(folder)
    prefix = "transformer" if config["model_type"] == "gpt2" else "model"
    files = [*shards, *aux.values(), folder / "config.json"]
    if (folder / "quantize_config.json").is_file():
        files.append(folder / "quantize_config.json")
    source = SafetensorsSource(shards, prefix, multimodal=is_multimodal(stored))
    carried = hf_folder.with_eos(aux, config, where)
    return Checkpoint(
        folder,
        config,
        source,
        aux=lambda: carried,
        files=files,
        quantization=quantization,
        outside=source.outside,
    )
