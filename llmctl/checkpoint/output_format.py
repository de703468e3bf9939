"""The formats that are written: one table of what each can hold, who reads it, and how a module's planes lie in it.

``docs/formats.md`` shows the table; a test holds it to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import llmctl
from llmctl.checkpoint import awq, bitsandbytes_planes, compressed_tensors_planes, gguf_encode, gptq
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.dtypes import HALF_DTYPES
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

PlaneSpecs = dict[str, tuple[str, tuple[int, ...]]]
"""Suffix -> (safetensors dtype, shape)."""
AS_STORED = "as stored"


@dataclass(frozen=True)
class WrittenFormat:
    """One format.

    Attributes:
        holds, readers: for users: which weights it can hold; who reads it.
        check: (shape [N, K], scheme) -> None, or a ValueError that says why such a weight cannot be held.
        specs: a weight -> what ``pack`` makes of it.
        pack: a weight -> its planes by suffix; ValueError for values that cannot be held.
        small: as ``pack``, its floats and shapes alone: they lie in another part of a file than integers do.
        config: settings -> ``quantization_config``; None for a format that is one .gguf file.
        config_copy: a file that repeats the config.
        mixed: modules may differ in their schemes.
        rounded: what a reader has of a weight, where scales are rounded as they are packed; None where nothing is.
    """

    holds: str
    readers: str
    check: Callable[[tuple[int, int], QuantScheme], None]
    specs: Callable[[QuantizedWeight], PlaneSpecs]
    pack: Callable[[QuantizedWeight], dict[str, Tensor]]
    small: Callable[[QuantizedWeight], dict[str, Tensor]] = lambda _: {}
    config: Callable[[OutputFormat], dict[str, Any]] | None = None
    config_copy: str = ""
    mixed: bool = True
    rounded: Callable[[QuantizedWeight], QuantizedWeight] | None = None

    @property
    def one_file(self) -> bool:
        """Whether a checkpoint is one .gguf file, not a folder."""
        return self.config is None


@dataclass(frozen=True)
class OutputFormat:
    """How a quantized checkpoint is to be written.

    Attributes:
        format: its name in ``FORMATS``.
        scheme: bits, group size and symmetry of most quantized weights; ``act_order`` is GPTQ's ``desc_act``.
        others: module -> its scheme, where it differs.
        ignored: modules left dense: AWQ's ``modules_to_not_convert``, negative entries of GPTQ's ``dynamic``.
        damp_percent, static_groups, true_sequential: recorded in GPTQ's config.
        dtype: of dense float tensors: "float16", "bfloat16", None for the source's if it has 16 bits, else float16; or
            ``AS_STORED``, every tensor in its own.

    Raises:
        ValueError: a format or dtype that there is not, or a format that cannot express ``others``.
    """

    format: str
    scheme: QuantScheme
    others: Mapping[str, QuantScheme] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    damp_percent: float = 0.01
    static_groups: bool = False
    true_sequential: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, found '{self.format}'")
        if self.dtype not in (None, AS_STORED, *HALF_DTYPES):
            raise ValueError(f"dtype: expected float16 or bfloat16, found '{self.dtype}'")
        if self.others and not self.row.mixed:
            module, scheme = min(self.others.items())
            raise ValueError(
                f"{self.format} has one scheme for all modules: {describe_scheme(self.scheme)}, but "
                f"{describe_scheme(scheme)} in {module}"
            )

    @property
    def row(self) -> WrittenFormat:
        """The format's entry in ``FORMATS``."""
        return FORMATS[self.format]

    def scheme_of(self, module: str) -> QuantScheme:
        """What a module is quantized to."""
        return self.others.get(module, self.scheme)

    def as_read(self, weight: QuantizedWeight) -> QuantizedWeight:
        """What a reader has of a module's weight."""
        return weight if self.row.rounded is None else self.row.rounded(weight)

    def check(self, module: str, shape: tuple[int, int]) -> None:
        """Refuse a module [N, K] that the format cannot hold.

        Raises:
            ValueError: naming it and the reason.
        """
        try:
            self.row.check(shape, self.scheme_of(module))
        except ValueError as error:
            raise ValueError(f"'{module}': {error}") from error

    def quantization_config(self) -> dict[str, Any]:
        """``quantization_config`` as the format's readers expect it; empty for a .gguf file."""
        return {} if self.row.config is None else self.row.config(self)


def describe_scheme(scheme: QuantScheme) -> str:
    """A scheme in a few words, for messages: ``4 bits, symmetric, groups of 128``."""
    kind = "with minimums" if scheme.minimum else "symmetric" if scheme.symmetric else "asymmetric"
    group = "a row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    if scheme.block_rows > 1:
        group = f"blocks of {scheme.block_rows} x {scheme.group_size}"
    return ", ".join(
        [scheme.book or f"{scheme.bits} bits, {kind}", group, *(["act-order"] if scheme.act_order else [])]
    )


def gptq_format(symmetric: bool) -> str:
    """The version of GPTQ's layout for a weight: readers refuse asymmetric version 1, and symmetric 2 is less read."""
    return "gptq" if symmetric else "gptq_v2"


def _common(settings: OutputFormat, method: str) -> dict[str, Any]:
    return {"bits": settings.scheme.bits, "group_size": settings.scheme.group_size, "quant_method": method}


def _awq_config(settings: OutputFormat) -> dict[str, Any]:
    return {
        **_common(settings, "awq"),
        "modules_to_not_convert": list(settings.ignored) or None,
        "version": "gemm",
        "zero_point": not settings.scheme.symmetric,
    }


def _gptq_config(settings: OutputFormat) -> dict[str, Any]:
    scheme = settings.scheme
    if any(other.symmetric != scheme.symmetric for other in settings.others.values()):
        raise ValueError("GPTQ's layout: symmetric and asymmetric modules do not go together")
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in settings.ignored if name != "lm_head"}
    dynamic |= {
        f"+:^{re.escape(name)}$": {"bits": other.bits, "group_size": other.group_size}
        for name, other in settings.others.items()
        if (other.bits, other.group_size) != (scheme.bits, scheme.group_size)
    }
    return {
        **_common(settings, "gptq"),
        **({"dynamic": dynamic} if dynamic else {}),
        "checkpoint_format": settings.format,
        "damp_percent": settings.damp_percent,
        "desc_act": any(one.act_order for one in (scheme, *settings.others.values())),
        "lm_head": False,
        "meta": {"quantizer": [f"llmctl:{llmctl.__version__}"]},
        "static_groups": settings.static_groups,
        "sym": scheme.symmetric,
        "true_sequential": settings.true_sequential,
    }


def _compressed_config(layout: str | None, settings: OutputFormat) -> dict[str, Any]:
    return compressed_tensors_planes.config(settings.scheme, settings.others, settings.ignored, layout)


def _bitsandbytes_config(double: bool, settings: OutputFormat) -> dict[str, Any]:
    dtype = settings.dtype if settings.dtype in HALF_DTYPES else "float32"
    return bitsandbytes_planes.config(settings.scheme, settings.ignored, dtype, double=double)


def _check_gptq_v1(shape: tuple[int, int], scheme: QuantScheme) -> None:
    gptq.check_packable(shape, scheme)
    if not scheme.symmetric:
        raise ValueError("version 1 of GPTQ's layout is written symmetric only: readers refuse another; use gptq_v2")


def _scales(weight: QuantizedWeight) -> dict[str, Tensor]:
    return {"scales": awq.half_scales(weight.scales)}


def _shape_specs(
    specs: Callable[[tuple[int, int], QuantScheme], PlaneSpecs],
) -> Callable[[QuantizedWeight], PlaneSpecs]:
    return lambda weight: specs(weight.shape, weight.scheme)


_W8A8 = "int-quantized"
FORMATS: Mapping[str, WrittenFormat] = {
    "awq": WrittenFormat(
        "4 bits, one group size for all modules",
        "llmctl, vLLM, SGLang, transformers with GPTQModel or AutoAWQ",
        awq.check_packable,
        _shape_specs(awq.plane_specs),
        awq.pack,
        _scales,
        _awq_config,
        mixed=False,
    ),
    "gptq": WrittenFormat(
        "2, 3, 4 and 8 bits, symmetric; act-order; bits and groups by module",
        "llmctl, GPTQModel and transformers with it; 4 and 8 bits: vLLM, SGLang",
        _check_gptq_v1,
        _shape_specs(gptq.plane_specs),
        partial(gptq.pack, checkpoint_format="gptq"),
        _scales,
        _gptq_config,
        "quantize_config.json",
    ),
    "gptq_v2": WrittenFormat(
        "2, 3, 4 and 8 bits; act-order; bits and groups by module",
        "llmctl, GPTQModel and transformers with it",
        gptq.check_packable,
        _shape_specs(gptq.plane_specs),
        partial(gptq.pack, checkpoint_format="gptq_v2"),
        _scales,
        _gptq_config,
        "quantize_config.json",
    ),
    "compressed-tensors": WrittenFormat(
        "4 and 8 bits (`pack-quantized`), float8 a row or block (`float-quantized`); a scheme by module",
        "llmctl, vLLM, SGLang, transformers with compressed-tensors",
        compressed_tensors_planes.check_packable,
        compressed_tensors_planes.plane_specs,
        compressed_tensors_planes.pack,
        compressed_tensors_planes.small_planes,
        partial(_compressed_config, None),
    ),
    "compressed-tensors-w8a8": WrittenFormat(
        "8 bits, symmetric, one scale a row (`int-quantized`); readers quantize activations to int8, by token",
        "llmctl, vLLM, SGLang, transformers with compressed-tensors",
        compressed_tensors_planes.check_int8,
        partial(compressed_tensors_planes.plane_specs, plain=True),
        partial(compressed_tensors_planes.pack, plain=True),
        compressed_tensors_planes.small_planes,
        partial(_compressed_config, _W8A8),
    ),
    "bitsandbytes": WrittenFormat(
        "NF4 and FP4 in blocks of 32 to 4096 that divide rows, a float32 scale a block; a block size by module",
        "llmctl, vLLM, transformers with bitsandbytes",
        bitsandbytes_planes.check_packable,
        bitsandbytes_planes.plane_specs,
        bitsandbytes_planes.pack,
        bitsandbytes_planes.small_planes,
        partial(_bitsandbytes_config, False),
    ),
    "bitsandbytes-double": WrittenFormat(
        "as `bitsandbytes`, scales rounded to 8 bits (double quantization); not to convert to",
        "llmctl, vLLM, transformers with bitsandbytes",
        bitsandbytes_planes.check_packable,
        partial(bitsandbytes_planes.plane_specs, double=True),
        partial(bitsandbytes_planes.pack, double=True),
        partial(bitsandbytes_planes.small_planes, double=True),
        partial(_bitsandbytes_config, True),
        rounded=bitsandbytes_planes.with_nested_scales,
    ),
    "gguf": WrittenFormat(
        "symmetric up to 4 bits (Q4_0) and 8 (Q8_0), 4 bits whose minimums float16 holds (Q4_1); groups of 32 or a "
        "multiple; a type by module",
        "llmctl, llama.cpp and what is made of it",
        gguf_encode.check_packable,
        gguf_encode.plane_specs,
        gguf_encode.pack,
    ),
}
"""By ``--format`` of ``llmctl quantize`` and ``--to`` of ``llmctl convert``."""
