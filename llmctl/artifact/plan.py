"""From a BuildConfig to everything a build will do: target, options, graph, planes, memory. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmctl.artifact.manifest import BuildOptions, QuantizationRecord, Target
from llmctl.artifact.memory import KV_BYTES, MemoryPlan, plan_memory
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.config import BuildConfig, parse_bytes
from llmctl.errors import UsageError
from llmctl.graph.check import check_graph
from llmctl.graph.graph import Graph
from llmctl.graph.passes import DEFAULT_PASSES, PASSES, apply_passes
from llmctl.targets.cpu.planes import LM_HEAD_BITS, cpu_choices, cpu_planes, dense_head
from llmctl.targets.cpu.toolchain import INSTALL_HINT, VARIANTS, find_compiler, library_name, supported_variants
from llmctl.targets.cuda.compile import ARCHITECTURES
from llmctl.targets.cuda.planes import cuda_planes
from llmctl.targets.cuda.registry import KernelChoice, choose_all
from llmctl.targets.device import NO_CUDA_RUNTIME, cpu_features
from llmctl.targets.planes import DTYPE_BYTES, Plane, dense_dtypes, flat, resident_bytes, settle_planes, total_bytes

TARGETS = ("cpu", "cpu:VARIANT[,VARIANT…]", "reference", "cuda:sm_XX[,sm_YY…]")


@dataclass(frozen=True)
class BuildPlan:
    """What a build will make.

    Attributes:
        name: the source model's name as the manifest records it.
        planes: stored tensors by the graph weight they belong to.
        choices: what executes each op.
    """

    name: str
    checkpoint: Checkpoint
    graph: Graph
    target: Target
    options: BuildOptions
    planes: Mapping[str, tuple[Plane, ...]]
    choices: tuple[KernelChoice, ...]
    memory: MemoryPlan

    @property
    def weights_bytes(self) -> int:
        """Size of all stored tensors."""
        return total_bytes(flat(self.planes).values())


def plan_build(config: BuildConfig) -> BuildPlan:
    """Resolve the model and every "auto", and lay the engine out.

    Raises:
        UsageError: an option that cannot be honoured.
        ModelNotFoundError, CheckpointError, UnsupportedModelError: as the checkpoint and the family table say.
    """
    target = parse_target(config.target)
    check_options(config)
    path = resolve_model(config.model)
    checkpoint = open_checkpoint(path)
    graph = apply_passes(checkpoint_graph(checkpoint), _passes(config, target))
    check_graph(graph)
    if config.activations == "int8" and not any("activations" in op.attrs for op in graph.linears()):
        raise UsageError(
            "--activations int8: the model has no linear of symmetric 8-bit weights",
            fix="llmctl quantize --bits 8 --symmetric",
            param="activations",
        )
    options = _options(config, target, checkpoint, graph)
    if target.native_cpu:
        planes = cpu_planes(graph, options)
    else:
        planes = settle_planes(graph, dense_dtypes(target.kind, options.dtype), checkpoint.describe)
        if target.kind == "cuda":
            planes = cuda_planes(graph, planes)
    stored = flat(planes)
    memory = plan_memory(
        graph,
        weights_bytes=resident_bytes(graph, target, options.dtype, stored.values()),
        dtype=options.dtype,
        target_kind=target.kind,
        kv_cache_dtype=options.kv_cache_dtype,
        block_size=options.block_size,
        max_model_len=options.max_model_len,
        budget=None if config.memory_budget is None else parse_bytes(config.memory_budget, param="memory_budget"),
    )
    return BuildPlan(
        name=source_name(config.model, path),
        checkpoint=checkpoint,
        graph=graph,
        target=target,
        options=options,
        planes=planes,
        choices=_choices(graph, target, options),
        memory=memory,
    )


def parse_target(text: str) -> Target:
    """A ``--target``: ``cpu`` (the native kernels' best variant here), ``cpu:avx2,portable``, ``reference`` or
    ``cuda:sm_80,sm_90``. Without a C++ compiler ``cpu`` has no variants: it runs on the reference runtime.

    Raises:
        UsageError: anything else.
    """
    kind, _, archs = text.partition(":")
    if kind == "reference" and not archs:
        return Target(kind)
    if kind == "cpu":
        return _cpu_target(archs)
    names = tuple(sorted(set(archs.split(",")), key=lambda a: (len(a), a)))
    unknown = [name for name in names if name not in ARCHITECTURES]
    if kind != "cuda" or unknown:
        found = f"'{text}'" if kind != "cuda" or not archs else f"'{unknown[0]}'"
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"--target: expected one of {', '.join(TARGETS)} ({known}), found {found}", param="target")
    return Target("cuda", names)


def check_has_runtime(target: Target) -> None:
    """Refuse a target that can be built but not run.

    Raises:
        UsageError: a cuda target.
    """
    if target.kind == "cuda":
        raise UsageError(f"--target {target}: {NO_CUDA_RUNTIME}", fix="--target cpu", param="target")


def check_options(config: BuildConfig) -> None:
    """Refuse options that are wrong whatever the model is.

    Raises:
        UsageError: the first of them.
    """
    if not config.model:
        raise UsageError("--model is required", param="model")
    if config.dtype not in ("auto", *DTYPE_BYTES):
        raise UsageError(
            f"--dtype: expected one of auto, {', '.join(DTYPE_BYTES)}, found '{config.dtype}'", param="dtype"
        )
    if config.kv_cache_dtype not in ("auto", "fp8", *KV_BYTES):
        known = ", ".join(KV_BYTES)
        raise UsageError(
            f"--kv-cache-dtype: expected one of auto, {known}, found '{config.kv_cache_dtype}'", param="kv_cache_dtype"
        )
    if config.activations not in ("auto", "int8"):
        raise UsageError(f"--activations: expected auto or int8, found '{config.activations}'", param="activations")
    if config.lm_head not in ("auto", "dense", *LM_HEAD_BITS):
        known = ", ".join(LM_HEAD_BITS)
        raise UsageError(f"--lm-head: expected auto, dense, {known}, found '{config.lm_head}'", param="lm_head")
    if config.block_size < 1 or config.block_size & (config.block_size - 1):
        raise UsageError(f"--block-size: expected a power of two, found {config.block_size}", param="block_size")
    if config.max_model_len is not None and config.max_model_len < 1:
        raise UsageError(f"--max-model-len: expected at least 1, found {config.max_model_len}", param="max_model_len")


def _cpu_target(names: str) -> Target:
    if not names:
        best = supported_variants(cpu_features())[0]
        return Target("cpu", (library_name(best),) if find_compiler() is not None else ())
    known = {alias: library_name(v) for v in VARIANTS for alias in (v.name.rpartition("-")[2], library_name(v))}
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        short = ", ".join(v.name.rpartition("-")[2] for v in VARIANTS)
        raise UsageError(f"--target cpu: expected some of {short}, found '{unknown[0]}'", param="target")
    return Target("cpu", tuple(library_name(v) for v in VARIANTS if library_name(v) in {known[w] for w in wanted}))


def _choices(graph: Graph, target: Target, options: BuildOptions) -> tuple[KernelChoice, ...]:
    if target.native_cpu:
        return cpu_choices(graph, options)
    return choose_all(graph, options.dtype, target.kind, options.kv_cache_dtype, options.block_size)


def source_name(model: str, path: Path) -> str:
    """What a manifest calls the model: a hub or demo id as given; of a local path the last part only."""
    return path.resolve().name if Path(model).expanduser().exists() else model


def quantization_record(graph: Graph, checkpoint: Checkpoint) -> QuantizationRecord:
    """How the graph's weights are quantized: the commonest scheme, and the linears left dense."""
    schemes = [weight.quant for weight in graph.weights.values() if weight.quant is not None]
    if not schemes or checkpoint.quantization is None:
        return QuantizationRecord()
    scheme = max(dict.fromkeys(schemes), key=schemes.count)
    linears = {op.weights[0] for op in graph.linears()}
    ignored = tuple(sorted(name for name in linears if graph.weights[name].quant is None))
    return QuantizationRecord(
        checkpoint.quantization.method, scheme.bits, scheme.group_size, scheme.symmetric, scheme.act_order, ignored
    )


def _passes(config: BuildConfig, target: Target) -> tuple[str, ...]:
    known = tuple(DEFAULT_PASSES if target.kind == "cpu" else PASSES)
    names = target.default_passes if config.passes is None else () if config.passes == ("none",) else config.passes
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"--passes: expected none, or some of {', '.join(known)}, found '{unknown[0]}'", param="passes"
        )
    if config.activations != "int8" or "int8_activations" in names:
        return names
    if target.kind == "cpu":
        raise UsageError(
            "--activations: expected auto for a cpu target, whose quantized linears take int8 rows by themselves",
            param="activations",
        )
    return (*names, "int8_activations")


def _kv_cache_dtype(name: str, target: Target, dtype: str) -> str:
    """The KV cache's dtype that an option names, one that the target's kernels have."""
    found = {"auto": dtype, "fp8": "fp8_e4m3"}.get(name, name)
    if target.kind == "cuda":
        known = (dtype, *(d for d in KV_BYTES if d not in DTYPE_BYTES))
    else:
        known = ("bfloat16", "float32", "int8") if target.native_cpu else tuple(DTYPE_BYTES)
    if found == "int8" and target.kind == "cpu" and not target.native_cpu:
        raise _no_compiler("kv_cache_dtype", name)
    if found not in known:
        raise UsageError(
            f"--kv-cache-dtype: expected one of auto, {', '.join(known)} for a {target.kind} target that computes in "
            f"{dtype}, found '{name}'",
            param="kv_cache_dtype",
        )
    return found


def _lm_head(name: str, target: Target, dtype: str, graph: Graph) -> str:
    """How the output head is stored: as the option says, where the native CPU kernels leave that open."""
    is_free = target.native_cpu and dtype != "float32" and dense_head(graph) is not None
    if name == "auto":
        quantized = any(weight.quant is not None for weight in graph.weights.values())
        return "int8" if is_free and quantized else "dense"
    if is_free or name not in LM_HEAD_BITS:
        return name
    if target.kind == "cpu" and not target.native_cpu:
        raise _no_compiler("lm_head", name)
    if target.kind != "cpu":
        where = f"a {target.kind} target"
    else:
        where = "a float32 engine" if dtype == "float32" else "a checkpoint whose output head is quantized"
    raise UsageError(f"--lm-head: expected auto or dense for {where}, found '{name}'", param="lm_head")


def _no_compiler(param: str, value: str) -> UsageError:
    """The refusal of an option that only the native CPU kernels honour, on a machine that cannot compile them."""
    return UsageError(
        f"--{param.replace('_', '-')} {value}: expected a C++ compiler for the kernels of a cpu target, found none",
        fix=INSTALL_HINT,
        param=param,
    )


def _options(config: BuildConfig, target: Target, checkpoint: Checkpoint, graph: Graph) -> BuildOptions:
    length = graph.max_position if config.max_model_len is None else config.max_model_len
    if length > graph.max_position:
        raise UsageError(
            f"--max-model-len: expected at most {graph.max_position}, the model's own limit, found {length}",
            param="max_model_len",
        )
    dtype = resolve_dtype(config.dtype, target, checkpoint.dtype)
    if target.kind == "cuda" and dtype == "float32":
        raise UsageError("--dtype: expected float16 or bfloat16 for a cuda target, found 'float32'", param="dtype")
    if target.native_cpu and dtype == "float16":
        raise UsageError("--dtype: expected bfloat16 or float32 for a cpu target, found 'float16'", param="dtype")
    if target.native_cpu and config.block_size % 16:
        raise UsageError(
            f"--block-size: expected a multiple of 16 for a cpu target, found {config.block_size}", param="block_size"
        )
    return BuildOptions(
        dtype,
        length,
        config.block_size,
        _kv_cache_dtype(config.kv_cache_dtype, target, dtype),
        graph.passes,
        lm_head=_lm_head(config.lm_head, target, dtype, graph),
    )


def resolve_dtype(dtype: str, target: Target, checkpoint_dtype: str) -> str:
    """The dtype that "auto" means for a target."""
    if dtype != "auto":
        return dtype
    if target.kind == "cuda":
        return "float16" if checkpoint_dtype == "float16" else "bfloat16"
    return "bfloat16" if target.native_cpu else "float32"


def op_counts(graph: Graph) -> dict[str, int]:
    """Ops per kind, sorted by kind."""
    kinds = sorted({op.kind for op in graph.ops})
    return {kind: sum(op.kind == kind for op in graph.ops) for kind in kinds}
