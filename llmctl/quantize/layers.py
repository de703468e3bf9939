"""One decoder layer through one method: scales found and folded, codes made stage by stage, errors measured.

Stages run in execution order and each sees the inputs that the already quantized linears before it produce.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import LlmctlError
from llmctl.graph.experts import as_linears, expert_layer
from llmctl.graph.graph import Graph, Op, QuantScheme
from llmctl.quantize.awq import ScaleChoice, quantize_awq, search_scales
from llmctl.quantize.books import quantize_book
from llmctl.quantize.folding import FoldPoint, find_fold, fold_scales
from llmctl.quantize.gptq import Factored, quantize_gptq
from llmctl.quantize.original_targets import cross_gram, original_target
from llmctl.quantize.plan import Plan
from llmctl.quantize.rtn import quantize_searched
from llmctl.quantize.smooth import search_smoothing, w8a8_error, w8a8_rounding
from llmctl.quantize.stats import InputStats, relative_error
from llmctl.quantize.workfolder import LayerResult
from llmctl.targets.reference.context import Env
from llmctl.targets.reference.layerwise import LayerwisePass, Stage

Algorithm = Callable[[Tensor, QuantScheme], QuantizedWeight]
_STACK = 1 << 24  # weights that are copied to be quantized together
_FEW_TOKENS = 32
"""Fewer than these do not tell what an expert is used for: it is rounded to nearest."""
_ORIGINAL = "original "  # begins the names of the unquantized model's activations, beside the quantized one's


def quantize_layer(
    graph: Graph, plan: Plan, calibration: LayerwisePass, layer: int, hidden: Env, last: bool
) -> tuple[LayerResult, Env]:
    """Quantize the chosen linears of a layer; their result and the activations leaving the layer.

    Args:
        calibration: the pass that holds the layer's weights; they are replaced by what was quantized.
        hidden: activations entering the layer.
        last: nothing after this layer will be quantized, so its outputs are not needed.
    """
    started = time.monotonic()
    run = _LayerRun(graph, plan, calibration, layer, last)
    leaving = run.quantize(hidden)
    report: dict[str, Any] = {
        "layer": layer,
        "modules": run.errors,
        "scales": run.scales,
        "few_tokens": run.few_tokens,
        "seconds": round(time.monotonic() - started, 3),
    }
    return LayerResult(run.quantized, run.changed_dense(), report), leaving


def quantize_layer_without_data(graph: Graph, plan: Plan, weights: LayerwisePass, layer: int) -> LayerResult:
    """Round a layer's linears to nearest; errors are those of the weights (of the outputs for white inputs)."""
    started = time.monotonic()
    quantized: dict[str, QuantizedWeight] = {}
    errors: dict[str, float] = {}
    names = {linear.weights[0]: linear.name for op in graph.layer_ops(layer) for linear in as_linears(op)}
    for module in plan.selection.of_layer(layer):
        parts = [weights.weights[name] for name in module.weights]
        scheme = plan.schemes[module.weights[0]]
        whole = (quantize_book if scheme.book else quantize_searched)(torch.cat(parts), scheme)
        dense = plan.output.as_read(whole).dequantize()
        start = 0
        for name, weight in zip(module.weights, parts, strict=True):
            rows = slice(start, start + len(weight))
            quantized[name] = whole.take_rows(rows)
            errors[names[name]] = relative_error(weight, dense[rows], None)
            start = rows.stop
    report = {"layer": layer, "modules": errors, "seconds": round(time.monotonic() - started, 3)}
    return LayerResult(quantized, {}, report)


def check_errors(layer: int, result: LayerResult) -> None:
    """Refuse a layer whose errors are no numbers: what was found there is of no use to the layers after it.

    Raises:
        LlmctlError: naming the linears.
    """
    odd = [name for name, error in result.report.get("modules", {}).items() if not math.isfinite(error)]
    if odd:
        raise _overflow(layer, f"the error of {', '.join(odd)} is")


def _overflow(layer: int, what: str) -> LlmctlError:
    return LlmctlError(
        f"layer {layer}: {what} not finite: what is computed from its (finite) weights overflows float32",
        fix="check the model: it computes nothing without quantization either",
    )


def _chosen(plan: Plan, layer: int) -> set[str]:
    return {name for module in plan.selection.of_layer(layer) for name in module.weights}


def _check_inputs(layer: int, stage: Stage, sizes: Tensor) -> None:
    """``sizes``: of every column, of its squares' sum."""
    if not bool(sizes.isfinite().all()):
        raise _overflow(layer, f"the inputs of {', '.join(op.name for op in stage.linears)} are")


class _LayerRun:
    """One layer on its way through."""

    def __init__(self, graph: Graph, plan: Plan, calibration: LayerwisePass, layer: int, last: bool) -> None:
        self.graph, self.plan, self.calibration, self.layer, self.last = graph, plan, calibration, layer, last
        self.rounds_activations = "w8a8" in plan.config.steps
        self.chosen = _chosen(plan, layer)
        self.stages = calibration.stages(layer, self.chosen)
        self.quantized: dict[str, QuantizedWeight] = {}
        self.errors: dict[str, float] = {}
        self.scales: dict[str, float | None] = {}
        self.few_tokens: dict[str, int] = {}
        self.changed: set[str] = set()
        self.folded: dict[str, Tensor] = {}
        self.original_inputs: dict[str, Tensor] = {}

    def quantize(self, hidden: Env) -> Env:
        own = {name: value for name, value in hidden.items() if not name.startswith(_ORIGINAL)}
        original = self._run_original(hidden, own) if self.plan.config.aims_at_original else {}
        if self.rounds_activations or "awq" in self.plan.config.steps:
            self._scale(own)
        leaving = self.calibration.run(self.layer, own, self.stages, self._quantize_stage, outputs=not self.last)
        return leaving | original

    def _run_original(self, hidden: Env, own: Env) -> Env:
        """Keep the inputs that the stages have in the unquantized model; its activations leaving the layer."""
        entering = {n.removeprefix(_ORIGINAL): value for n, value in hidden.items() if n.startswith(_ORIGINAL)}

        def keep(stage: Stage, x: Tensor) -> None:
            if not stage.experts:  # other tokens may choose an expert once the layers before it are quantized
                self.original_inputs[stage.name] = x

        leaving = self.calibration.run(self.layer, entering or own, self.stages, keep, outputs=not self.last)
        return {_ORIGINAL + name: value for name, value in leaving.items()}

    def changed_dense(self) -> dict[str, Tensor]:
        return {name: self.calibration.weights[name] for name in sorted(self.changed - self.chosen)}

    def _scale(self, hidden: Env) -> None:
        """Find channel scales for every stage on the unquantized layer, then fold them."""
        found: dict[str, ScaleChoice] = {}

        stages = self.calibration.stages(self.layer, self.chosen, by_rows=False)
        points = {stage.name: self._fold_point(stage) for stage in stages}

        def search(stage: Stage, x: Tensor) -> None:
            point = points[stage.name]
            if point is not None and not self._has_few(stage, x):
                found[stage.name] = self._search(stage, x, point.column_index(x.device))

        self.calibration.run(self.layer, hidden, stages, search, outputs=False)
        weights = self.calibration.weights
        for stage in stages:
            choice, point = found.get(stage.name), points[stage.name]
            self.scales[stage.name] = None if choice is None else choice.alpha
            if choice is not None and choice.alpha is not None and point is not None:
                self.changed |= fold_scales(point, choice.scales, weights)
                self.folded[stage.name] = choice.scales
        for name in self.changed - self.chosen:
            weights[name] = self._stored(weights[name])

    def _search(self, stage: Stage, inputs: Tensor, columns: Tensor | None) -> ScaleChoice:
        # Linears of the fewest bits have the error: one set of scales serves all that read a buffer.
        scheme, linears = min(self._by_scheme(stage), key=lambda group: group[0].bits)
        weights = [self.calibration.weights[op.weights[0]] for op in linears]
        if self.rounds_activations:
            return search_smoothing(weights, inputs, scheme, columns)
        stats = InputStats.of(inputs)
        _check_inputs(self.layer, stage, stats.gram.diagonal())
        return search_scales(weights, stats, scheme, columns)

    def _fold_point(self, stage: Stage) -> FoldPoint | None:
        graph = expert_layer(self.graph, self.layer, stage.expert) if stage.experts else self.graph
        return find_fold(graph, stage.buffer)

    def _has_few(self, stage: Stage, inputs: Tensor) -> bool:
        """Whether an expert saw too few tokens to be calibrated on them."""
        return bool(stage.experts) and len(inputs) < _FEW_TOKENS

    def _stored(self, dense: Tensor) -> Tensor:
        """What a dense tensor is after it has been written: later stages are to make up for its rounding."""
        return dense.to(getattr(torch, self.plan.dense_dtype)).float()

    def _quantize_stage(self, stage: Stage, inputs: Tensor) -> None:
        if self._has_few(stage, inputs):
            self._round(stage, len(inputs))
            return
        gram = None if self.rounds_activations else InputStats.of(inputs).gram  # w8a8 has its own, of rounded inputs
        sizes = torch.linalg.vector_norm(inputs, dim=0) if gram is None else gram.diagonal()
        _check_inputs(self.layer, stage, sizes)
        algorithm = self._algorithm(stage, inputs, gram)
        self.errors |= {op.name: math.nan for op in stage.linears}  # in their order, whatever the schemes' is
        for scheme, alike in self._by_scheme(stage):
            for linears in self._stacks(alike):
                weights = [self.calibration.weights[op.weights[0]] for op in linears]
                whole = algorithm(weights[0] if len(weights) == 1 else torch.cat(weights), scheme)
                start = 0
                for op, weight in zip(linears, weights, strict=True):
                    part = whole.take_rows(slice(start, start := start + len(weight)))
                    dense = part.dequantize()
                    self.errors[op.name] = (
                        w8a8_error(weight, dense, inputs) if gram is None else relative_error(weight, dense, gram)
                    )
                    self.quantized[op.weights[0]], self.calibration.weights[op.weights[0]] = part, dense

    def _round(self, stage: Stage, tokens: int) -> None:
        """Round an expert's linears to nearest; their errors are those of the weights."""
        for op in stage.linears:
            name = op.weights[0]
            weight = self.calibration.weights[name]
            self.quantized[name] = quantize_searched(weight, self.plan.schemes[name])
            dense = self.quantized[name].dequantize()
            self.errors[op.name] = relative_error(weight, dense, None)
            self.few_tokens[op.name] = tokens
            self.calibration.weights[name] = dense

    def _algorithm(self, stage: Stage, inputs: Tensor, gram: Tensor | None) -> Algorithm:
        """From a weight of the stage to its quantization."""
        if gram is None:
            return w8a8_rounding(inputs)
        if "gptq" not in self.plan.config.steps:
            return lambda weight, scheme: quantize_awq(weight, gram, scheme)
        options, share = self.plan.gptq, self.plan.config.original_targets
        factored = Factored.of(gram, options)
        original = self.original_inputs.pop(stage.name, None)
        if original is None:
            return lambda weight, scheme: quantize_gptq(weight, factored, scheme, options)
        cross = cross_gram(original, inputs, self.folded.get(stage.name))
        return lambda weight, scheme: quantize_gptq(
            original_target(weight, factored, cross, share), factored, scheme, options
        )

    def _by_scheme(self, stage: Stage) -> list[tuple[QuantScheme, list[Op]]]:
        """A stage's linears, those of one scheme together."""
        found: dict[QuantScheme, list[Op]] = {}
        for op in stage.linears:
            found.setdefault(self.plan.schemes[op.weights[0]], []).append(op)
        return list(found.items())

    def _stacks(self, linears: list[Op]) -> list[list[Op]]:
        """Small linears together, so that a method's steps are few; large ones alone, so that their copies are."""
        sizes = [math.prod(self.graph.weights[op.weights[0]].shape) for op in linears]
        return [linears] if sum(sizes) <= _STACK else [[op] for op in linears]
