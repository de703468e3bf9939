"""Checkpoint in, quantized checkpoint out: layer by layer, resumable, nothing half written.

The plain Graph is walked from its first decoder layer to its last. Each layer is calibrated on what the already
quantized layers before it produce. Finished layers lie in a work folder beside the output until the output is in place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmctl.checkpoint.adapters.opening import open_merged
from llmctl.checkpoint.assemble import WeightSource, accounted_graph, assemble, checkpoint_graph
from llmctl.checkpoint.quantized import QuantizedWeight, stack_rows
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.writer import write_quantized_checkpoint
from llmctl.config import QuantizeConfig
from llmctl.errors import LlmctlError
from llmctl.graph.experts import apart
from llmctl.graph.graph import Graph
from llmctl.quantize.budget import Budget, spend
from llmctl.quantize.calibration import SELF, Calibration, read_calibration, self_calibration
from llmctl.quantize.layers import check_errors, quantize_layer, quantize_layer_without_data
from llmctl.quantize.modules import Module
from llmctl.quantize.plan import Plan, check_not_quantized, check_options, make_plan, notes
from llmctl.quantize.report import LayerReport, QuantizeReport, make_report
from llmctl.quantize.rotation import rotate, rotated
from llmctl.quantize.workfolder import LayerResult, WorkFolder, check_output, open_work_folder
from llmctl.targets.reference.layerwise import LayerwisePass
from llmctl.text.tokenizer import Tokenizer


class Progress(Protocol):
    """Who wants to know how far a quantization is."""

    def note(self, text: str) -> None:
        """A choice or a fact worth a line."""
        ...

    def calibrating(self, done: int, total: int) -> None:
        """Tokens of self-generated text written."""
        ...

    def measuring(self, done: int, total: int) -> None:
        """Candidates for a budget have passed a layer so often."""
        ...

    def layer(self, done: int, total: int, report: LayerReport) -> None:
        """A layer is finished (or was, in an earlier run)."""
        ...


class Silent:
    """A Progress that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def calibrating(self, done: int, total: int) -> None:
        """Nothing."""

    def measuring(self, done: int, total: int) -> None:
        """Nothing."""

    def layer(self, done: int, total: int, report: LayerReport) -> None:
        """Nothing."""


def quantize_checkpoint(config: QuantizeConfig, progress: Progress = Silent()) -> QuantizeReport:
    """Quantize ``config.model`` into the new folder ``config.output`` with the native algorithms.

    Raises:
        UsageError: options that cannot be honoured; an output or interrupted run in the way.
        CheckpointError, UnsupportedModelError: a model that cannot be read.
        ModelNotFoundError: no such model or data set.
    """
    started = time.monotonic()
    check_options(config)
    output = Path(config.output)
    check_output(output, config.resume)
    merged = open_merged(config.model, config.merge_adapter, "merge_adapter", config.as_family)
    check_not_quantized(merged.checkpoint)
    for note in merged.notes:
        progress.note(note)
    with _threads(config.threads):
        job = _Job(config, merged.checkpoint, progress)
        layers = job.run(output)
    seconds = time.monotonic() - started
    graph = checkpoint_graph(merged.checkpoint) if config.rotate else job.graph
    adapters = [one.described for one in merged.adapters]
    return make_report(job.plan, graph, merged.base, job.note, layers, seconds, job.predicted_kl, adapters)


def calibrate(config: QuantizeConfig, checkpoint: Checkpoint, graph: Graph, progress: Progress) -> Calibration:
    """The calibration tokens that the options ask for; errors as ``read_calibration``."""
    tokenizer = Tokenizer.from_files(checkpoint.aux_files(), where=str(checkpoint.path))
    samples, length, seed = config.calib_samples, config.calib_length, config.seed
    if config.calib != SELF:
        return read_calibration(config.calib, tokenizer, samples, length, seed)
    progress.note("the model writes its calibration text")
    return self_calibration(
        checkpoint, tokenizer, graph.vocab_size, samples, length, seed, on_progress=progress.calibrating
    )


class _Job:
    """One run over one checkpoint."""

    def __init__(self, config: QuantizeConfig, checkpoint: Checkpoint, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.checkpoint = rotate(checkpoint, config.seed) if config.rotate else checkpoint
        plain, self.unused = accounted_graph(self.checkpoint)
        self.graph = apart(plain)
        self.plan: Plan = make_plan(config, self.checkpoint, self.graph)
        if config.rotate:
            self._say(_turned(checkpoint, self.checkpoint, self.graph))
        if self.plan.budget is None:
            self._say(notes(self.plan))
        self.predicted_kl: float | None = None
        self.layers = sorted({module.layer for module in self.plan.selection.modules})
        self.note = "none (round to nearest looks at weights only)"

    def run(self, output: Path) -> list[LayerReport]:
        self.progress.note(f"reading {self.config.model}")  # all of it, for its fingerprint
        options = {**self.plan.options(self.checkpoint), "threads": torch.get_num_threads()}
        work = open_work_folder(output, options)
        try:
            tokens = self._tokens(work)
            if self.plan.budget is not None:
                self._allocate(work, self.plan.budget, tokens)
            reports = self._quantize(work, LayerwisePass(self.graph, self.checkpoint, tokens, self.config.device))
            self._write(output, work)
        except LlmctlError:
            if not work.resumed:
                work.remove()  # refused, not interrupted: there is nothing to continue
            raise
        except OSError as error:
            raise LlmctlError(
                f"{error.filename or output}: {error.strerror or error}",
                fix=f"make room, then repeat the command with --resume: finished layers are in {work.path}",
            ) from error
        except BaseException:
            self.progress.note(f"interrupted; finished layers are kept in {work.path}: continue with --resume")
            raise
        work.remove()
        return reports

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self.progress.note(line)

    def _tokens(self, work: WorkFolder) -> Tensor:
        """i32 ``[samples, length]``; one token that nothing looks at where no text is read."""
        if not self.plan.reads_text:
            return torch.zeros(1, 1, dtype=torch.int32)
        kept = work.load_calibration()
        if kept is None:
            made = calibrate(self.config, self.checkpoint, self.graph, self.progress)
            self.checkpoint.release()
            work.save_calibration(made.tokens, made.note)
            kept = (made.tokens, made.note)
        tokens, self.note = kept
        self.progress.note(f"calibration: {self.note}")
        return tokens

    def _allocate(self, work: WorkFolder, budget: Budget, tokens: Tensor) -> None:
        """Choose the bits of every linear, and settle the plan anew."""
        found = work.load_allocation()
        if found is None:
            schemes, measuring = self.plan.schemes, self.progress.measuring
            found = spend(budget, schemes, self.graph, self.checkpoint, tokens, measuring, self.config.device)
            work.save_allocation(found)
        self.plan, self.predicted_kl = (
            make_plan(self.config, self.checkpoint, self.graph, found.bits),
            found.predicted_kl,
        )
        self._say(notes(self.plan))

    def _quantize(self, work: WorkFolder, calibration: LayerwisePass) -> list[LayerReport]:
        """Run every layer up to the last that has something to quantize. Step i of the work folder is layer i."""
        reports: list[LayerReport] = []
        steps = self.layers[-1] + 1
        done = work.finished()
        self.progress.note(f"quantizing {steps} layers with {self.plan.config.method}")
        if done:
            self.progress.note(f"resuming after layer {done}")
        hidden = _on(self.config.device, work.load_hidden(done))
        for layer in range(steps):
            if layer >= done:
                if hidden is None:
                    hidden = calibration.enter() if self.plan.calibrated else {}
                result, hidden = self._step(calibration, layer, hidden, last=layer == steps - 1)
                check_errors(layer, result)
                work.save_layer(layer, result, hidden)
                calibration.forget(layer)
                self.checkpoint.release()
            else:
                result = work.load_layer(layer)
            report = LayerReport.from_json(result.report)
            reports.append(report)
            self._say(_few_tokens_note(report))
            if layer >= done:
                self.progress.layer(layer + 1, steps, report)
        return reports

    def _step(
        self, calibration: LayerwisePass, layer: int, hidden: dict[str, Tensor], last: bool
    ) -> tuple[LayerResult, dict[str, Tensor]]:
        if self.plan.calibrated:
            return quantize_layer(self.graph, self.plan, calibration, layer, hidden, last)
        return quantize_layer_without_data(self.graph, self.plan, calibration, layer), {}

    def _write(self, output: Path, work: WorkFolder) -> None:
        self.progress.note(f"writing {output}")
        results = _Results(work, self.layers[-1] + 1)
        quantized = _Modules(results, self.plan.selection.modules)
        write_quantized_checkpoint(
            output,
            self.checkpoint,
            quantized,
            results.dense(self.graph, self.checkpoint),
            self.plan.output,
            left_out=[name for unused in self.unused for name in unused.names],
        )


def _on(device: str, hidden: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if hidden is None else {name: value.to(device) for name, value in hidden.items()}


def _few_tokens_note(report: LayerReport) -> list[str]:
    """What to say of a layer's experts that calibration hardly reached."""
    few = report.few_tokens
    if not few:
        return []
    least = min(few, key=few.__getitem__)
    return [
        f"layer {report.layer}: {len(few)} of {len(report.modules)} linears are of experts that saw too few tokens "
        f"(fewest: {few[least]}, {least}) and are rounded to nearest: more --calib-samples reach them"
    ]


def _turned(before: Checkpoint, after: Checkpoint, graph: Graph) -> list[str]:
    """What to know of a rotation."""
    added = sum(2 * prod(after.describe(name).shape) for name in after.names() if not before.has(name))
    if not added:
        return [rotated(graph)]
    return [rotated(graph), f"the output head no longer shares the embeddings: {added / 2**20:.1f} MiB more"]


class _Results:
    """The work folder's layers, mapped one at a time."""

    def __init__(self, work: WorkFolder, steps: int) -> None:
        self._work, self._steps = work, steps
        self._current: tuple[int, LayerResult] | None = None

    def layer(self, index: int) -> LayerResult:
        if self._current is None or self._current[0] != index:
            self._current = (index, self._work.load_layer(index))
        return self._current[1]

    def dense(self, graph: Graph, source: WeightSource) -> dict[str, Tensor]:
        """Checkpoint tensors that folding changed, in their stored orientation."""
        changed = {n: t for i in range(self._steps) for n, t in self._work.load_layer(i).dense.items()}
        tensors = sorted({graph.weights[name].parts[0].tensor for name in changed})
        return {tensor: _whole(graph, source, tensor, changed) for tensor in tensors}


def _whole(graph: Graph, source: WeightSource, tensor: str, changed: Mapping[str, Tensor]) -> Tensor:
    """A checkpoint tensor put together from the row slices that changed and those that did not."""
    weights = [w for w in graph.weights.values() if w.parts[0].tensor == tensor]
    pieces: dict[int, Tensor] = {}  # by the first row
    for weight in weights:
        value = changed[weight.name] if weight.name in changed else assemble(weight, source)
        assert isinstance(value, Tensor)
        ranges = [part.rows or (0, len(value)) for part in weight.parts]
        parts = value.float().split([end - start for start, end in ranges])
        pieces |= {start: part for (start, _), part in zip(ranges, parts, strict=True)}
    whole = torch.cat([pieces[start] for start in sorted(pieces)])
    return whole.T.contiguous() if weights[0].parts[0].transpose else whole


class _Modules(Mapping[str, QuantizedWeight]):
    """Module name -> its quantized weight, put together from the work folder when asked for."""

    def __init__(self, results: _Results, modules: tuple[Module, ...]) -> None:
        self._results = results
        self._modules = {module.name: module for module in modules}

    def __getitem__(self, name: str) -> QuantizedWeight:
        module = self._modules[name]
        parts = self._results.layer(module.layer).quantized
        return stack_rows([parts[weight] for weight in module.weights])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
