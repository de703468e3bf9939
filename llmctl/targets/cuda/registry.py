"""Which CUDA kernel serves which op, and why the others refused.

A candidate looks at an op's facts and either takes it or gives its reason in one line. The choice and every reason are
recorded in the engine's manifest, so that "why is this layer slow?" has an answer without a debugger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmctl.graph.dtypes import DTYPES, HALF_DTYPES, kv_name
from llmctl.graph.graph import LOGITS, Graph, Op
from llmctl.targets.base import FALLBACK, KernelChoice, Refusal
from llmctl.targets.cuda.attention import AttentionShape
from llmctl.targets.cuda.experts import EXPERTS_SOURCE, grouped_entries, grouped_source
from llmctl.targets.cuda.gemm import GEMM_ROWS, gemm_entries, gemm_sources, int8_entries, product_format
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.lora import LORA_SOURCE, MAX_RANK, RANK_MULTIPLE, lora_entries

SAMPLER_OPS = (
    Op("sample", "sample", (LOGITS,), ("tokens",)),
    Op("adjust_logits", "adjust_logits", (LOGITS,), (LOGITS,)),
    Op("logprobs", "logprobs", (LOGITS, "tokens"), ("logprobs",)),
)
"""What a runtime does with a step's logits: no part of any graph, but a part of every engine."""


@dataclass(frozen=True)
class OpFacts:
    """What a candidate may judge by: the op, its graph, dtypes of activations and KV cache, and the tokens of a KV
    block."""

    op: Op
    graph: Graph
    dtype: str
    kv_dtype: str
    block_size: int

    @property
    def tag(self) -> str:
        """The activation dtype as entry points spell it."""
        return DTYPES[self.dtype].tag

    @property
    def kv_tag(self) -> str:
        """The KV cache's dtype as entry points spell it."""
        return DTYPES[self.kv_dtype].tag

    @property
    def width(self) -> int:
        """Columns of the op's first output, or of its first input when it has none."""
        return self.graph.buffers[(*self.op.outputs, *self.op.inputs)[0]].width


@dataclass(frozen=True)
class Kernel:
    """A candidate. ``refuse`` gives the reason it cannot serve an op, or None; ``entries`` its entry points, and
    ``sources`` the files those are in."""

    name: str
    sources: Callable[[OpFacts], tuple[str, ...]]
    kinds: frozenset[str]
    refuse: Callable[[OpFacts], str | None]
    entries: Callable[[OpFacts], tuple[str, ...]]
    max_rows: int = 0


def files(*names: str) -> Callable[[OpFacts], tuple[str, ...]]:
    """``Kernel.sources`` of a candidate that always needs the same files."""
    return lambda _: names


def refuse_dtype(facts: OpFacts) -> str | None:
    """Why kernels for 16-bit activations cannot serve an op."""
    if facts.dtype not in HALF_DTYPES:
        return f"activations are {facts.dtype}; the kernel takes {' or '.join(HALF_DTYPES)}"
    return None


def _refuse_width(facts: OpFacts) -> str | None:
    if facts.width % 8:
        return f"width {facts.width} is not a multiple of 8 (one 16-byte load)"
    return refuse_dtype(facts)


def _refuse_layer_norm(facts: OpFacts) -> str | None:
    return "the kernel does not add one to the weight" if facts.op.attrs.get("plus_one") else _refuse_width(facts)


def _refuse_head_norm(facts: OpFacts) -> str | None:
    dim = facts.op.attrs["head_dim"]
    return f"head size {dim} is not a multiple of 8 (one 16-byte load)" if dim % 8 else refuse_dtype(facts)


def _refuse_rope_kv(facts: OpFacts) -> str | None:
    dim = facts.op.attrs.get("head_dim") or facts.graph.kv[facts.op.attrs["layer"]].head_dim
    if dim % 4 or dim > 256:
        return f"head size {dim}; the kernel takes multiples of 4 up to 256"
    if facts.op.kind != "rope" and facts.dtype in HALF_DTYPES and facts.kv_tag not in (facts.tag, "s8", "e4m3"):
        return f"the KV cache is {kv_name(facts.kv_dtype)}; the kernel stores {facts.dtype}, int8 or fp8"
    return refuse_dtype(facts)


def _attention_shape(facts: OpFacts) -> AttentionShape:
    heads, kv_heads, dim = (facts.op.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    return AttentionShape(facts.tag, facts.kv_tag, heads, kv_heads, dim, facts.block_size)


def _refuse_attention(facts: OpFacts) -> str | None:
    if facts.dtype not in HALF_DTYPES:
        return refuse_dtype(facts)
    if facts.kv_tag not in (facts.tag, "s8", "e4m3"):
        return f"the KV cache is {kv_name(facts.kv_dtype)}; the kernels read {facts.dtype}, int8 or fp8"
    try:
        _attention_shape(facts)
    except ValueError as error:
        return str(error)
    return None


def _refuse_gated(facts: OpFacts) -> str | None:
    if "epilogue" not in facts.op.attrs:
        return "the linear has no gated epilogue; its product is torch's"
    if facts.graph.weights[facts.op.weights[0]].quant is not None:
        return "the weight is quantized; the product before this kernel is torch's, of dense weights"
    return _refuse_width(facts)


def _gemm_format(facts: OpFacts) -> CudaFormat:
    return product_format(facts.op, facts.graph)


_CODES = {
    "w4": "4-bit integers", "w8": "8-bit integers", "fp8": "float8 codes", "book4": "4-bit codes of a code book",
    "k4": "4-bit integers in groups of 16 or with minimums", "k8": "8-bit integers in groups of 16 or with minimums",
}  # fmt: skip


def _refuse_gemm(kind: str) -> Callable[[OpFacts], str | None]:
    def refuse(facts: OpFacts) -> str | None:
        try:
            stored = _gemm_format(facts).kind
        except ValueError as error:
            return str(error)
        if "activations" in facts.op.attrs:
            return "activations are int8; the kernel takes 16-bit ones"
        if stored != kind:
            return f"the weight has {_CODES[stored]}; the kernel reads {_CODES[kind]}"
        return refuse_dtype(facts)

    return refuse


def _refuse_int8(facts: OpFacts) -> str | None:
    if "activations" not in facts.op.attrs:
        return (
            "activations are not quantized (int8_activations was not asked for, or the weight is not symmetric, of 5 "
            "to 8 bits)"
        )
    columns = facts.graph.weights[facts.op.weights[0]].shape[1]
    if columns % 16:
        return f"{columns} columns are not a multiple of 16 (one 16-byte load of int8)"
    try:
        stored = _gemm_format(facts).kind
    except ValueError as error:
        return str(error)
    if stored != "w8":
        return f"the weight has {_CODES[stored]}; the kernel reads {_CODES['w8']}"
    return refuse_dtype(facts)


def _refuse_lora(facts: OpFacts) -> str | None:
    rank, buffers = facts.op.attrs["rank"], facts.graph.buffers
    if rank > MAX_RANK or rank % RANK_MULTIPLE:
        return f"rank {rank}; the kernels take multiples of {RANK_MULTIPLE} up to {MAX_RANK}"
    for width in (buffers[facts.op.inputs[0]].width, facts.op.attrs["rows"], facts.op.attrs["column"]):
        if width % 8:
            return f"width {width} is not a multiple of 8 (one 16-byte load)"
    return refuse_dtype(facts)


def _refuse_grouped_dense(facts: OpFacts) -> str | None:
    columns = facts.graph.weights[facts.op.weights[0]].shape[1]
    return f"{columns} columns are not a multiple of 8 (one 16-byte load)" if columns % 8 else refuse_dtype(facts)


def _refuse_sample(facts: OpFacts) -> str | None:
    if facts.graph.vocab_size > 2**23:
        return f"vocabulary of {facts.graph.vocab_size}; the kernel sums exactly up to {2**23}"
    return refuse_dtype(facts)


def _kind_entries(facts: OpFacts) -> tuple[str, ...]:
    return (f"{facts.op.kind}_{facts.tag}",)


def _rope_kv_entries(facts: OpFacts) -> tuple[str, ...]:
    return (f"rope_kv_{facts.tag}_{facts.tag if facts.op.kind == 'rope' else facts.kv_tag}",)


def _attention_entries(facts: OpFacts) -> tuple[str, ...]:
    return _attention_shape(facts).entries


def quantizer(op: Op) -> str:
    """The entry, less the dtype, that makes an op's int8 rows."""
    return "quantize_s8" if op.kind == "quantize" else f"{op.attrs['fn']}_mul_s8"


def _elementwise_entries(facts: OpFacts) -> tuple[str, ...]:
    fn = facts.op.attrs.get("fn")
    name = {"act": f"act_{fn}", "act_mul": f"{fn}_mul"}.get(facts.op.kind, facts.op.kind)
    return (f"{name}_{facts.tag}",)


def _gemm(kind: str) -> Kernel:
    """Weights of codes by 16-bit activations; beyond ``max_rows`` torch multiplies weights dequantized into scratch."""
    return Kernel(
        f"{kind}a16",
        lambda facts: gemm_sources(_gemm_format(facts)),
        frozenset({"linear"}),
        _refuse_gemm(kind),
        lambda facts: gemm_entries(_gemm_format(facts), facts.dtype),
        GEMM_ROWS,
    )


def _grouped(kind: str) -> Kernel:
    """A product of experts: of a kind of codes, or dense, as weights are kept that no kernel reads packed."""
    coded = kind != "dense"

    def packed(facts: OpFacts) -> CudaFormat | None:
        return _gemm_format(facts) if coded else None

    def entries(facts: OpFacts) -> tuple[str, ...]:
        shape, chosen = facts.graph.weights[facts.op.weights[0]].shape, facts.graph.buffers[facts.op.inputs[1]].width
        return grouped_entries(
            (shape[0], shape[1]), facts.op.attrs["count"], facts.dtype, chosen, packed(facts),
            gated="epilogue" in facts.op.attrs,
        )  # fmt: skip

    return Kernel(
        f"grouped_{kind}a16" if coded else f"grouped_{kind}",
        lambda facts: (grouped_source(packed(facts)), EXPERTS_SOURCE),
        frozenset({"grouped_linear"}),
        _refuse_gemm(kind) if coded else _refuse_grouped_dense,
        entries,
    )


def _cuda(
    name: str, source: str, kinds: str, refuse: Callable[[OpFacts], str | None],
    entries: Callable[[OpFacts], tuple[str, ...]],
) -> Kernel:  # fmt: skip
    return Kernel(name, files(source), frozenset(kinds.split()), refuse, entries)


KERNELS: tuple[Kernel, ...] = (
    _cuda("embed", "elementwise.cu", "embed gather_rows", _refuse_width, lambda f: (f"embed_{f.tag}",)),
    _cuda("pos_embed", "elementwise.cu", "pos_embed", _refuse_width, _kind_entries),
    _cuda("rms_norm", "norm.cu", "rms_norm add_rms_norm rms_norm_s8 add_rms_norm_s8", _refuse_width, _kind_entries),
    _cuda("layer_norm", "norm.cu", "layer_norm add_layer_norm layer_norm_s8 add_layer_norm_s8",
          _refuse_layer_norm, _kind_entries),
    _cuda("head_rms_norm", "norm.cu", "head_rms_norm", _refuse_head_norm, _kind_entries),
    _cuda("rope_kv", "rope_kv.cu", "rope kv_write rope_kv_write", _refuse_rope_kv, _rope_kv_entries),
    Kernel("paged_attention", lambda f: _attention_shape(f).sources, frozenset({"attention"}),
           _refuse_attention, _attention_entries),
    _cuda("elementwise", "elementwise.cu", "act act_mul mul add", _refuse_width, _elementwise_entries),
    _cuda("quantize_rows", "quantize_rows.cu", "quantize act_mul_s8", _refuse_width,
          lambda f: (f"{quantizer(f.op)}_{f.tag}",)),
    _gemm("w4"),
    _gemm("w8"),
    _gemm("fp8"),
    _gemm("book4"),
    _gemm("k4"),
    _gemm("k8"),
    _cuda("w8a8", "w8a8_gemm.cu", "linear", _refuse_int8, lambda f: int8_entries(f.dtype)),
    _cuda("lora", LORA_SOURCE, "lora", _refuse_lora, lambda f: lora_entries(f.tag, f.op.attrs["rank"])),
    _cuda("dense_gated", "elementwise.cu", "linear", _refuse_gated,
          lambda f: (f"{f.op.attrs['epilogue']}_{f.tag}",)),
    _cuda("route", EXPERTS_SOURCE, "route", refuse_dtype, _kind_entries),
    _grouped("w4"),
    _grouped("w8"),
    _grouped("fp8"),
    _grouped("book4"),
    _grouped("k4"),
    _grouped("k8"),
    _grouped("dense"),
    _cuda("weighted_sum", EXPERTS_SOURCE, "weighted_sum", _refuse_width, _kind_entries),
    _cuda("sample", "sampling.cu", "sample", _refuse_sample,
          lambda f: (f"sample_{f.tag}", "sample_f32", "feed_tokens")),
    _cuda("adjust_logits", "logits.cu", "adjust_logits", refuse_dtype, lambda _: ("add_bias", "penalise")),
    _cuda("logprobs", "logits.cu", "logprobs", refuse_dtype, lambda _: ("logprobs",)),
)  # fmt: skip


def choose(facts: OpFacts) -> KernelChoice:
    """The first kernel that takes the op, else ``FALLBACK``, with every refusal before it."""
    refused: list[Refusal] = []
    for kernel in KERNELS:
        if facts.op.kind not in kernel.kinds:
            continue
        reason = kernel.refuse(facts)
        if reason is None:
            return KernelChoice(
                facts.op.name,
                kernel.name,
                kernel.entries(facts),
                kernel.sources(facts),
                kernel.max_rows,
                tuple(refused),
            )
        refused.append(Refusal(kernel.name, reason))
    return KernelChoice(facts.op.name, FALLBACK, refused=tuple(refused))


def choose_all(graph: Graph, dtype: str, kv_dtype: str, block_size: int) -> tuple[KernelChoice, ...]:
    """``choose`` for every op of a graph, in execution order, and for sampling after them."""
    return tuple(choose(OpFacts(op, graph, dtype, kv_dtype, block_size)) for op in (*graph.ops, *SAMPLER_OPS))


def sources_of(choices: Iterable[KernelChoice]) -> tuple[str, ...]:
    """Source files that the chosen kernels are compiled from, sorted."""
    return tuple(sorted({source for choice in choices for source in choice.sources}))
