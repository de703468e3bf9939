"""Write a quantized checkpoint: a Hugging Face folder in AutoAWQ's or GPTQ's format, whole or not at all.

The folder holds ``config.json`` (with ``quantization_config``), safetensors shards, the source's tokenizer, chat
template and generation config as they are, and for GPTQ ``quantize_config.json``. The same inputs give the same bytes.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmctl
from llmctl.checkpoint import awq, gptq
from llmctl.checkpoint.folder import check_parent, published_folder
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import TensorSpec, torch_dtype_name, write_sharded
from llmctl.errors import CheckpointError, UsageError
from llmctl.graph.dtypes import DTYPES, FLOAT_DTYPES, HALF_DTYPES
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

_STORED_FLOATS = tuple(DTYPES[name].safetensors for name in FLOAT_DTYPES)
_FLOATS = tuple(f"torch.{DTYPES[name].torch}" for name in FLOAT_DTYPES)


@dataclass(frozen=True)
class OutputFormat:
    """How a quantized checkpoint is to be written.

    Attributes:
        format: "awq" (AutoAWQ GEMM, 4 bits) or "gptq".
        scheme: bits, group size and symmetry of every quantized weight; ``act_order`` is GPTQ's ``desc_act``.
        checkpoint_format: GPTQ only: "gptq" (v1, stores zero - 1, read by everything; zeros must be >= 1) or "gptq_v2".
        ignored: modules left dense: AWQ's ``modules_to_not_convert``, negative entries of GPTQ's ``dynamic``.
        damp_percent, static_groups, true_sequential: recorded in GPTQ's config.
        dtype: of dense float tensors: "float16", "bfloat16", or None for the source's if it has 16 bits, else float16.
    """

    format: str
    scheme: QuantScheme
    checkpoint_format: str = "gptq"
    ignored: tuple[str, ...] = ()
    damp_percent: float = 0.01
    static_groups: bool = False
    true_sequential: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.format not in ("awq", "gptq"):
            raise ValueError(f"format: expected awq or gptq, found '{self.format}'")
        if self.dtype not in (None, *HALF_DTYPES):
            raise ValueError(f"dtype: expected float16 or bfloat16, found '{self.dtype}'")

    def quantization_config(self) -> dict[str, Any]:
        """``quantization_config`` as AutoAWQ and GPTQ readers expect it."""
        scheme = self.scheme
        common = {"bits": scheme.bits, "group_size": scheme.group_size, "quant_method": self.format}
        if self.format == "awq":
            ignored = list(self.ignored) or None
            return {
                **common,
                "modules_to_not_convert": ignored,
                "version": "gemm",
                "zero_point": not scheme.symmetric,
            }
        excluded: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in self.ignored if name != "lm_head"}
        return {
            **common,
            **({"dynamic": excluded} if excluded else {}),
            "checkpoint_format": self.checkpoint_format,
            "damp_percent": self.damp_percent,
            "desc_act": scheme.act_order,
            "lm_head": False,
            "meta": {"quantizer": [f"llmctl:{llmctl.__version__}"]},
            "static_groups": self.static_groups,
            "sym": scheme.symmetric,
            "true_sequential": self.true_sequential,
        }


def write_quantized_checkpoint(
    output: Path,
    source: Checkpoint,
    quantized: Mapping[str, QuantizedWeight],
    replaced_dense: Mapping[str, Tensor],
    settings: OutputFormat,
    *,
    left_out: Collection[str] = (),
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write ``source`` with some linears quantized and some dense tensors replaced; returns ``output``.

    One module is in memory at a time if the mappings load lazily (from per-layer files, say): a weight is looked up
    once while the shards are laid out, where only its shape and scheme are used, and again when its planes are written.

    Args:
        output: the folder to create; it appears by a rename once everything is on disk.
        quantized: module name (``model.layers.0.mlp.up_proj``) -> its weight [N, K]. Its bias stays as it is.
        replaced_dense: tensor name -> new value in the source's stored orientation (norms that AWQ scaled, biases).
        settings: format and the values of ``quantization_config``.
        left_out: the source's tensors that are known to be superfluous.
        extra_files: further files to put into the folder, by name.

    Raises:
        UsageError: ``output`` exists.
        ValueError: a weight the format cannot hold, or whose scheme is not ``settings.scheme``; a quantized module that
            the source does not have.
        CheckpointError: a dense value too large for the 16-bit dtype; a quantized source.
    """
    check_parent(output)
    if output.exists():
        raise UsageError(f"--output {output}: exists already", fix="choose another folder or remove it", param="output")
    if source.quantization is not None:
        raise CheckpointError(f"{source.path}: is quantized already ({source.quantization.method})")
    plan = _Plan(source, quantized, replaced_dense, settings, left_out)
    tensors = plan.tensors()
    with published_folder(output) as folder:
        write_sharded(folder, tensors, max_shard_bytes=max_shard_bytes)
        _write_config(folder, source, settings, plan)
        for name, content in {**source.aux_files(), **(extra_files or {})}.items():
            _put(folder / name, content)
    return output


class _Plan:
    """Which tensors the new checkpoint has, each with a function that makes its data when its turn comes."""

    def __init__(
        self,
        source: Checkpoint,
        quantized: Mapping[str, QuantizedWeight],
        replaced: Mapping[str, Tensor],
        settings: OutputFormat,
        left_out: Collection[str],
    ) -> None:
        self._source, self._quantized, self._replaced, self._settings = source, quantized, replaced, settings
        self._names = frozenset(source.names()).difference(left_out)
        self.dtype = settings.dtype or (source.dtype if source.dtype in HALF_DTYPES else "float16")
        # A Mapping's default `in` loads the value, so names are looked up here.
        self._modules = frozenset(quantized)
        self._packed = functools.lru_cache(maxsize=1)(self._pack)

    @property
    def head_quantized(self) -> bool:
        return "lm_head" in self._modules

    @property
    def has_head(self) -> bool:
        """Whether the new checkpoint has a head of its own, whatever the source's config says."""
        return self.head_quantized or "lm_head.weight" in {*self._names, *self._replaced}

    def tensors(self) -> dict[str, TensorSpec]:
        missing = [m for m in self._modules if f"{m}.weight" not in self._names and m != "lm_head"]
        if missing:
            raise ValueError(f"quantized module '{min(missing)}' has no weight in {self._source.path}")
        specs: dict[str, TensorSpec] = {}
        for name in sorted({*self._names, *self._replaced, *(f"{m}.weight" for m in self._modules)}):
            module = name.removesuffix(".weight")
            if name != module and module in self._modules:
                specs |= self._quantized_specs(module)
            else:
                specs[name] = self._dense_spec(name)
        return specs

    def _dense_spec(self, name: str) -> TensorSpec:
        replacement = self._replaced.get(name)
        if replacement is not None:
            stored, shape = torch_dtype_name(replacement.dtype), tuple(replacement.shape)
        else:
            info = self._source.describe(name)
            stored, shape = info.dtype, info.shape
        if stored not in _STORED_FLOATS:
            return (stored, shape, functools.partial(self._dense, name))
        return (DTYPES[self.dtype].safetensors, shape, functools.partial(self._dense, name))

    def _dense(self, name: str) -> Tensor:
        import torch

        value = self._replaced.get(name)
        tensor = self._source.weight(name) if value is None else value
        assert isinstance(tensor, torch.Tensor)
        if str(tensor.dtype) not in _FLOATS:
            return tensor
        cast = tensor.to(getattr(torch, self.dtype))
        if not bool(cast.isfinite().all()):
            found = "not finite" if not bool(tensor.isfinite().all()) else f"too large for {self.dtype}"
            raise CheckpointError(f"{self._source.path}: tensor '{name}' has values that are {found}")
        return cast

    def _quantized_specs(self, module: str) -> dict[str, TensorSpec]:
        weight = self._quantized[module]
        self._check(module, weight)
        specs = awq.plane_specs if self._settings.format == "awq" else gptq.plane_specs
        return {
            f"{module}.{suffix}": (dtype, shape, self._plane(module, suffix))
            for suffix, (dtype, shape) in specs(weight.shape, weight.scheme).items()
        }

    def _check(self, module: str, weight: QuantizedWeight) -> None:
        found, wanted = weight.scheme, self._settings.scheme
        same = (found.bits, found.group_size, found.symmetric) == (wanted.bits, wanted.group_size, wanted.symmetric)
        if not same or (found.act_order and not wanted.act_order):
            raise ValueError(f"'{module}': expected {wanted}, found {found}")
        try:
            check = awq.check_packable if self._settings.format == "awq" else gptq.check_packable
            check(weight.shape, weight.scheme)
        except ValueError as error:
            raise ValueError(f"'{module}': {error}") from error

    def _plane(self, module: str, suffix: str) -> Callable[[], Tensor]:
        return lambda: self._packed(module, suffix == "scales")[suffix]

    def _pack(self, module: str, scales: bool) -> dict[str, Tensor]:
        """Scales lie in another part of the file than the integer planes, so the two are made at different times."""
        weight = self._quantized[module]
        try:
            if scales:
                return {"scales": awq.half_scales(weight.scales)}
            if self._settings.format == "awq":
                return awq.pack(weight)
            return gptq.pack(weight, self._settings.checkpoint_format)
        except ValueError as error:
            raise ValueError(f"'{module}': {error}") from error


def _write_config(folder: Path, source: Checkpoint, settings: OutputFormat, plan: _Plan) -> None:
    quantization = settings.quantization_config()
    if "lm_head" in quantization:
        quantization["lm_head"] = plan.head_quantized
    key = "torch_dtype" if "torch_dtype" in source.config else "dtype"
    config = {**source.config, key: plan.dtype, "quantization_config": quantization}
    if plan.has_head:
        config["tie_word_embeddings"] = False
    _put(folder / "config.json", _json(config))
    if settings.format == "gptq":
        _put(folder / "quantize_config.json", _json(quantization))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _put(path: Path, content: Path | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)
