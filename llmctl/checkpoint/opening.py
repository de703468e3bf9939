"""Open a checkpoint, whatever it is: a Hugging Face folder (one file or shards) or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from llmctl.checkpoint import hf_folder
from llmctl.checkpoint.methods import read_method
from llmctl.checkpoint.reader import Checkpoint, SafetensorsSource
from llmctl.checkpoint.text_config import is_multimodal, text_model_config
from llmctl.checkpoint.unknown_family import read_as
from llmctl.errors import ModelNotFoundError, UsageError
from llmctl.graph.family_table import FAMILIES


def open_checkpoint(path: Path, *, widen: bool = False, as_family: str = "") -> Checkpoint:
    """Open a Hugging Face folder or a .gguf file; only headers and small files are read.

    Args:
        widen: give the blocks of a GGUF file as floats, for what starts from an unquantized checkpoint.
        as_family: the family that a folder of an unknown one is read as, on a user's word; "": none.

    Raises:
        UsageError: an ``as_family`` that is not known, or where the checkpoint's own is.
        ModelNotFoundError: nothing there, or not a checkpoint.
        CheckpointError: damaged, incomplete, or pickle weights only.
        UnsupportedModelError: a quantization method or GGUF architecture this version cannot read.
    """
    if path.is_file() and path.suffix == ".gguf":
        from llmctl.checkpoint.gguf_file import open_gguf

        if as_family:
            raise UsageError(
                f"--as {as_family}: {path} is a GGUF file, whose tensors have names of its own family",
                fix="leave --as out",
                param="as_family",
            )
        return open_gguf(path, widen=widen)
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}: no such checkpoint folder or .gguf file")
    return _open_folder(path, as_family)


def _open_folder(folder: Path, as_family: str) -> Checkpoint:
    stored = hf_folder.read_config(folder)
    where = str(folder / "config.json")
    config = text_model_config(stored, where)
    if as_family:
        config = read_as(config, as_family, where)
    raw = hf_folder.quantization_config(folder, config)
    quantization, layout = read_method(*raw) if raw else (None, None)
    shards = hf_folder.shard_paths(folder)
    aux = hf_folder.aux_files(folder)
    family = FAMILIES.get(config["model_type"])
    prefix = "model" if family is None else family.base
    files = [*shards, *aux.values(), folder / "config.json"]
    files += [folder / name for name in hf_folder.QUANTIZATION_FILES if (folder / name).is_file()]
    source = SafetensorsSource(shards, prefix, multimodal=is_multimodal(stored))
    carried = hf_folder.with_eos(aux, config, where)
    return Checkpoint(
        folder,
        config,
        source,
        aux=lambda: carried,
        files=files,
        quantization=quantization,
        layout=layout,
        outside=source.outside,
    )
