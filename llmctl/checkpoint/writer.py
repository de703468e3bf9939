"""Write a checkpoint, quantized or plain: a Hugging Face folder or a .gguf file, whole or not at all.

A folder holds ``config.json`` (with ``quantization_config``, if it is quantized), safetensors shards, and the source's
tokenizer, chat template and generation config as they are. The same inputs give the same bytes.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.dense_tensors import DenseTensors
from llmctl.checkpoint.folder import check_parent, published_file, published_folder
from llmctl.checkpoint.hf_folder import QUANTIZATION_KEYS
from llmctl.checkpoint.output_format import FORMATS, OutputFormat
from llmctl.checkpoint.output_plan import OutputPlan
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import spec_nbytes, write_sharded
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def check_new(output: Path, format: str | None = None) -> None:
    """Refuse an ``--output`` that exists, or that is not named as what it will be.

    Args:
        format: a name in ``FORMATS``; None: the name is not looked at.

    Raises:
        UsageError: as said.
    """
    check_parent(output)
    if output.exists() or output.is_symlink():
        raise UsageError(f"--output {output}: exists already", fix="choose another name or remove it", param="output")
    if format is None:
        return
    one_file = FORMATS[format].one_file
    if one_file != (output.suffix == ".gguf"):
        wanted = "one file, NAME.gguf" if one_file else "a folder, found the name of a .gguf file"
        raise UsageError(f"--output {output}: {format} is {wanted}", fix="rename it", param="output")


def check_writable(source: Checkpoint, settings: OutputFormat) -> None:
    """Refuse a model or tokenizer that the format is not written for, before anything is computed.

    Raises:
        UsageError: as ``gguf_writer.file_metadata``.
    """
    if settings.row.one_file:
        from llmctl.checkpoint.gguf_writer import file_metadata

        file_metadata(source)


def write_quantized_checkpoint(
    output: Path,
    source: Checkpoint,
    quantized: Mapping[str, QuantizedWeight],
    replaced_dense: Mapping[str, Tensor],
    settings: OutputFormat,
    *,
    left_out: Collection[str] = (),
    max_shard_bytes: int = 5 * 10**9,
    check: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write ``source`` with some linears quantized and some dense tensors replaced; returns ``output``.

    One module is in memory at a time if the mappings load lazily (from per-layer files, say): a weight is looked up
    once while the file is laid out, where only its shape, scheme and scales are used, and again when its planes are
    written.

    Args:
        output: the folder or .gguf file to create; it appears by a rename once everything is on disk.
        quantized: module name (``model.layers.0.mlp.up_proj``) -> its weight [N, K]. Its bias stays as it is.
        replaced_dense: tensor name -> new value in the source's stored orientation (norms that AWQ scaled, biases).
        settings: format and the values of ``quantization_config``.
        left_out: the source's tensors that are known to be superfluous.
        check: called with what was written before it appears at ``output``; what it raises keeps it from appearing.

    Raises:
        UsageError: ``output`` exists; a model or tokenizer that GGUF is not written for.
        ValueError: a weight the format cannot hold, or whose scheme is not the settings'; a quantized module that the
            source does not have.
        CheckpointError: a dense value too large for the 16-bit dtype.
    """
    check_new(output, settings.format)
    plan = OutputPlan(source, quantized, replaced_dense, settings, left_out)
    if settings.row.one_file:
        from llmctl.checkpoint.gguf_writer import write_gguf

        with published_file(output) as path:
            write_gguf(path, source, plan)
            check(path)
        return output
    tensors = plan.tensors()
    with published_folder(output) as folder:
        write_sharded(folder, tensors, max_shard_bytes=max_shard_bytes)
        _write_config(folder, source, plan)
        _put_aux(folder, source)
        check(folder)
    return output


def write_plain_checkpoint(
    output: Path,
    source: Checkpoint,
    dtype: str,
    *,
    left_out: Collection[str] = (),
    max_shard_bytes: int = 5 * 10**9,
    on_tensor: Callable[[str, int, int], None] = lambda *_: None,
) -> int:
    """Write a dense ``source`` as a folder, a tensor in memory at a time; returns the bytes of the tensors.

    Args:
        dtype: of its floats.
        left_out, max_shard_bytes: as ``write_quantized_checkpoint`` takes them.
        on_tensor: is told of every tensor written: (its name, done, in all).

    Raises:
        UsageError: ``output`` exists.
        CheckpointError: a value that is not finite, or too large for the dtype.
    """
    check_new(output)
    dense = DenseTensors(source, {}, dtype)
    names = [name for name in source.names() if name not in left_out]
    done = itertools.count(1)

    def value(name: str) -> Tensor:
        source.release()  # what was mapped for the tensors before
        made = dense.value(name)
        on_tensor(name, next(done), len(names))
        return made

    tensors = {name: (*dense.spec(name)[:2], functools.partial(value, name)) for name in names}
    with published_folder(output) as folder:
        write_sharded(folder, tensors, max_shard_bytes=max_shard_bytes)
        _put(folder / "config.json", _json({**source.config, _dtype_key(source): dtype}))
        _put_aux(folder, source)
    return sum(spec_nbytes(spec) for spec in tensors.values())


def _put_aux(folder: Path, source: Checkpoint) -> None:
    for name, content in source.aux_files().items():
        _put(folder / name, content)


def _dtype_key(source: Checkpoint) -> str:
    return "torch_dtype" if "torch_dtype" in source.config else "dtype"


def _write_config(folder: Path, source: Checkpoint, plan: OutputPlan) -> None:
    quantization = dict(plan.config)
    if "lm_head" in quantization:
        quantization["lm_head"] = plan.head_quantized
    config = {key: value for key, value in source.config.items() if key not in QUANTIZATION_KEYS}
    config |= {_dtype_key(source): plan.dtype, "quantization_config": quantization}
    if plan.has_head:
        config["tie_word_embeddings"] = False
    _put(folder / "config.json", _json(config))
    if plan.settings.row.config_copy:
        _put(folder / plan.settings.row.config_copy, _json(quantization))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _put(path: Path, content: Path | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)
