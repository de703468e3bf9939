"""What would make an engine fit that does not: each remedy planned as it would be, and named only when it helps."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

from llmctl.artifact.memory import MemoryPlan, Sizing, human_bytes
from llmctl.config import QUANTIZED_BITS, QUANTIZED_GROUP, QuantizeConfig
from llmctl.graph.graph import LOGITS, Graph, QuantScheme

_NARROW_CACHE = "int8"


def advice(sizing: Sizing, model: str, *, running: bool = True) -> str:
    """One line: everything that alone would make it fit, the gentlest first; what is left to do when nothing would.

    Args:
        sizing: of a plan that does not fit. model: what ``llmctl quantize --model`` would be given, quoted.
        running: the options of a run may change as well as those of a build.
    """
    found = tuple(_remedies(sizing, sizing.plan(), model, running))
    if found:
        return "; or ".join(found)
    return "free memory, or use a smaller model: the weights and activations alone do not fit"


def _remedies(sizing: Sizing, plan: MemoryPlan, model: str, running: bool) -> Iterator[str]:
    yield from _quantize(sizing, plan, model)
    yield from _narrower_cache(sizing)
    if 0 < plan.largest_max_model_len < plan.max_model_len:
        yield f"use --max-model-len {plan.largest_max_model_len} or less"
    if running:
        yield from _fewer_sequences(sizing)
        yield from _smaller_steps(sizing)
        yield from _larger_share(sizing, plan)


def _quantize(sizing: Sizing, plan: MemoryPlan, model: str) -> Iterator[str]:
    found = quantized(sizing)
    if found is None:
        return
    then = found.plan()
    if not then.fits and (plan.largest_max_model_len or not then.largest_max_model_len):
        return
    length = "" if then.fits else f", with --max-model-len {then.largest_max_model_len}"
    name = shlex.quote(f"{shlex.split(model)[0].rstrip('/').rpartition('/')[2]}-{QUANTIZED_BITS}bit")
    yield (
        f"quantize it: the weights at {QUANTIZED_BITS} bits would take {human_bytes(then.weights)} "
        f"(llmctl quantize --model {model} --bits {QUANTIZED_BITS} --output {name}, and then use {name}{length})"
    )


def quantized(sizing: Sizing) -> Sizing | None:
    """The same model with its dense linears as ``llmctl quantize`` would leave them; None when none would change."""
    graph, target, options = sizing.graph, sizing.target, sizing.options
    names = {
        op.weights[0] for op in graph.products() if LOGITS not in op.outputs and _quantizable(graph, op.weights[0])
    }
    if not names:
        return None
    scheme = QuantScheme(QUANTIZED_BITS, QUANTIZED_GROUP, QuantizeConfig().is_symmetric)
    weights = {name: replace(w, quant=scheme) if name in names else w for name, w in graph.weights.items()}
    other = replace(graph, weights=weights)
    before, after = target.planes(graph, options), target.planes(other, options)
    gone = {plane.name for name in names for plane in before[name]}
    kept = tuple(plane for plane in sizing.planes if plane.name not in gone)
    return replace(sizing, graph=other, planes=kept + tuple(plane for name in names for plane in after[name]))


def _quantizable(graph: Graph, name: str) -> bool:
    weight = graph.weights[name]
    return weight.quant is None and len(weight.shape) == 2 and weight.shape[1] % QUANTIZED_GROUP == 0


def _narrower_cache(sizing: Sizing) -> Iterator[str]:
    options = replace(sizing.options, kv_cache_dtype=_NARROW_CACHE)
    if _NARROW_CACHE not in sizing.target.kv_cache_dtypes(sizing.options):
        return
    then = replace(sizing, options=options).plan()
    if then.fits and then.kv_per_token < sizing.target.kv_bytes_per_token(sizing.graph, sizing.options):
        yield f"--kv-cache-dtype {_NARROW_CACHE} (the longest sequence is then {then.largest_max_model_len} tokens)"


def _fewer_sequences(sizing: Sizing) -> Iterator[str]:
    most = sizing.request.step_limits(sizing.target).max_num_seqs
    low, high = 0, most  # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = replace(sizing, request=replace(sizing.request, max_num_seqs=middle)).plan().fits
        low, high = (middle, high) if fits else (low, middle)
    if low:
        yield f"--max-num-seqs {low} or fewer"


def _smaller_steps(sizing: Sizing) -> Iterator[str]:
    tokens = sizing.request.step_limits(sizing.target).max_num_batched_tokens
    while tokens := tokens // 2:  # not searched: each plan tries every number of rows
        if replace(sizing, request=replace(sizing.request, max_num_batched_tokens=tokens)).plan().fits:
            yield f"--max-num-batched-tokens {tokens} or fewer"
            return


def _larger_share(sizing: Sizing, plan: MemoryPlan) -> Iterator[str]:
    if sizing.request.budget is not None or "gpu_memory_utilization" not in sizing.target.run_options:
        return
    low, high = 0, 100  # hundredths: low does not fit, high may
    needed = plan.fixed + plan.kv_bytes_of_one
    while high - low > 1:
        middle = (low + high) // 2
        enough = sizing.target.memory_budget(middle / 100).size >= needed
        low, high = (low, middle) if enough else (middle, high)
    if sizing.target.memory_budget(high / 100).size >= needed and not _asked_cache_is_short(sizing, plan):
        yield f"--gpu-memory-utilization {high / 100:g}"


def _asked_cache_is_short(sizing: Sizing, plan: MemoryPlan) -> bool:
    asked = sizing.request.kv_cache_bytes
    return asked is not None and asked < plan.kv_bytes_of_one
