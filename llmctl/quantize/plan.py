"""From the options to a settled plan: every choice made and every refusal spoken before anything is computed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmctl.checkpoint import awq
from llmctl.checkpoint.output_format import FORMATS as WRITTEN
from llmctl.checkpoint.output_format import OutputFormat, gptq_format
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.writer import check_new, check_writable
from llmctl.config import QuantizeConfig, parse_bytes
from llmctl.errors import UsageError
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.quantize.budget import Budget, make_budget
from llmctl.quantize.calibration import check_lengths, file_of, source_digest
from llmctl.quantize.gptq import GptqOptions
from llmctl.quantize.grid import BITS, check_scheme
from llmctl.quantize.methods import method_of, scheme_of
from llmctl.quantize.modules import Selection, select_modules
from llmctl.quantize.overrides import DENSE_BITS, Override, apply_overrides, parse_override
from llmctl.targets.machine import check_threads

FORMATS = ("auto", *WRITTEN)
_FEW_READERS = 3


@dataclass(frozen=True)
class Plan:
    """A settled quantization.

    Attributes:
        config: the options as given.
        scheme: bits, group size, symmetry as given; ``act_order`` when columns will need a ``g_idx``.
        schemes: graph weight -> its own scheme, for all that are quantized.
        gptq: GPTQ's knobs.
        selection: modules to quantize, modules left dense.
        budget: what bits are to be chosen for, until they are.
        output: how the checkpoint is written; dense_dtype: its dense tensors' dtype, float16 or bfloat16.
    """

    config: QuantizeConfig
    scheme: QuantScheme
    schemes: Mapping[str, QuantScheme]
    gptq: GptqOptions
    selection: Selection
    budget: Budget | None
    output: OutputFormat
    dense_dtype: str

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations."""
        return method_of(self.config).calibrated

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed: by the method, or to choose bits."""
        return self.calibrated or self.config.has_budget

    def options(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Everything the result's bytes depend on, as JSON data."""
        c = self.config
        common: dict[str, Any] = {
            "model": checkpoint.fingerprint(),
            "method": c.method,
            "bits": self.scheme.bits,
            "group_size": self.scheme.group_size,
            "symmetric": self.scheme.symmetric,
            "format": self.output.format,
            "ignore": sorted(c.ignore),
            "override": list(c.override),
            "target_bpw": c.target_bpw,
            "target_size": c.target_size,
        }
        if c.merge_adapter:
            common["merge_adapter"] = list(c.merge_adapter)  # the weights; the files are in the fingerprint
        if self.reads_text:
            common |= {"calib": c.calib, "calib_samples": c.calib_samples, "calib_length": c.calib_length}
            common |= {"calib_sha256": source_digest(c.calib), "seed": c.seed}
        if c.device != "cpu":
            common["device"] = c.device
        if c.rotate:
            common |= {"rotate": True, "seed": c.seed}
        if "gptq" in c.steps:
            common |= {"damp_percent": c.damp_percent, "act_order": c.act_order, "static_groups": c.static_groups}
            common |= {"sweeps": c.sweeps, "original_targets": c.original_targets}
        return common


def check_options(config: QuantizeConfig) -> None:
    """Refuse options that no model can honour, before the model is looked for.

    Raises:
        UsageError: as said, naming the option.
    """
    method, scheme = method_of(config), scheme_of(config)
    if config.max_kl is not None or config.max_size is not None:
        raise UsageError(
            "--max-kl and --max-size: choose among methods", fix=f"--method auto, not {config.method}", param="method"
        )
    if config.format not in FORMATS:
        raise UsageError(f"--format {config.format}: expected one of {', '.join(FORMATS)}", param="format")
    check_scheme(scheme, {})
    for text in config.override:
        _check_override(config, parse_override(text))
    if not 0 < config.damp_percent < 1:
        raise UsageError(
            f"--damp-percent {config.damp_percent}: expected a share between 0 and 1", param="damp_percent"
        )
    if config.sweeps < 0:
        raise UsageError(f"--sweeps {config.sweeps}: expected 0 or more", param="sweeps")
    if not 0 <= config.original_targets <= 1:
        raise UsageError(
            f"--original-targets {config.original_targets}: expected a share from 0 to 1", param="original_targets"
        )
    check_threads(config.threads)
    _check_device(config.device)
    if not config.output:
        raise UsageError("--output: the folder to write is missing", fix="--output ./quantized", param="output")
    if config.has_budget:
        _check_budget(config)
    if method.calibrated or config.has_budget:
        file_of(config.calib)


def make_plan(
    config: QuantizeConfig, checkpoint: Checkpoint, graph: Graph, bits: Mapping[str, int] | None = None
) -> Plan:
    """Settle a quantization of a checkpoint.

    Args:
        bits: module -> what was chosen for it; None: nothing has been.

    Raises:
        UsageError: a group size that does not divide a width (the ones that do are offered), a format that cannot
            hold the result, calibration sizes the model cannot do.
        UsageError: the checkpoint is quantized already.
    """
    check_not_quantized(checkpoint)
    scheme = replace(scheme_of(config), act_order=_needs_g_idx(config))
    overrides = [parse_override(text) for text in config.override]
    selection, schemes = apply_overrides(overrides, select_modules(graph, config.ignore), scheme, bits or {})
    _check_schemes(scheme, schemes, selection)
    _check_experts(graph, schemes)
    chosen = choose_format(config, set(schemes.values()))
    if method_of(config).calibrated or config.has_budget:
        check_lengths(config.calib_samples, config.calib_length, graph.max_position)
    dtype = checkpoint.dtype if checkpoint.dtype == "bfloat16" else "float16"
    by_module = {module.name: schemes[module.weights[0]] for module in selection.modules}
    usual = scheme if scheme in by_module.values() else Counter(by_module.values()).most_common(1)[0][0]
    output = OutputFormat(
        format=chosen,
        dtype=dtype,
        scheme=usual,
        others={name: own for name, own in by_module.items() if own != usual},
        ignored=tuple(sorted({*selection.ignored, *_tied_head(selection)})),
        damp_percent=config.damp_percent,
        static_groups="gptq" in config.steps and config.static_groups,
        true_sequential="gptq" in config.steps,
    )
    budget = None
    if config.has_budget and bits is None:
        pinned = {m.name for m in selection.modules for o in overrides if o.bits is not None and m.matches(o.pattern)}
        budget = make_budget(config, checkpoint, graph, selection, schemes, pinned, output)
    else:
        _check_packable(selection, output)
    check_new(Path(config.output), output.format)
    check_writable(checkpoint, output)
    options = GptqOptions(config.damp_percent, config.act_order, config.static_groups, sweeps=config.sweeps)
    return Plan(config, scheme, schemes, options, selection, budget, output, dtype)


def choose_format(config: QuantizeConfig, schemes: Collection[QuantScheme]) -> str:
    """A name in ``output_format.FORMATS``: the method's own, AutoAWQ's layout for AWQ at 4 bits, GPTQ's for
    everything else, unless the user says. Asymmetric weights in GPTQ's layout are version 2.

    Args:
        schemes: all that linears are quantized to.

    Raises:
        UsageError: a format that cannot hold what the options make.
    """
    wanted, formats = config.format, method_of(config).formats
    if formats:
        if wanted not in ("auto", *formats):
            raise UsageError(
                f"--format {wanted}: --method {config.method} is written as {' or '.join(formats)}",
                fix=f"--format {formats[0]}",
                param="format",
            )
        return formats[0] if wanted == "auto" else wanted
    alike = {scheme.bits for scheme in schemes} == {awq.BITS} and len(schemes) == 1 and not config.has_budget
    if wanted == "auto":
        wanted = "awq" if config.method == "awq" and alike else "gptq"
    if wanted == "gptq":
        return gptq_format(config.is_symmetric)
    if wanted == "awq" and not alike:
        found = "linears that differ" if len(schemes) > 1 or config.has_budget else f"{next(iter(schemes)).bits} bits"
        raise UsageError(
            f"--format awq: AutoAWQ's layout has 4 bits and one group size for all linears, found {found}",
            fix="--format gptq, which holds what any --method makes",
            param="format",
        )
    if not wanted.startswith("gptq") and any(scheme.act_order for scheme in schemes):
        raise UsageError(
            f"--format {wanted}: the layout cannot hold act-order groups",
            fix="add --static-groups or --no-act-order, or use --format gptq",
            param="format",
        )
    if wanted == "gguf" and not config.is_symmetric:
        raise UsageError(
            "--format gguf: fitted zero points become minimums, which float16 does not hold as they are",
            fix="add --symmetric",
            param="format",
        )
    return wanted


def notes(plan: Plan) -> list[str]:
    """What to know about a plan before any time is spent on it."""
    if all(scheme.bits != _FEW_READERS for scheme in plan.schemes.values()):
        return []
    if plan.output.row.one_file:
        return [f"{_FEW_READERS} bits: {plan.output.format} stores them as 4, and so does an engine of it"]
    return [
        f"{_FEW_READERS} bits: read by llmctl, GPTQModel and transformers with it; not by vLLM's kernels; an engine "
        "for NVIDIA GPUs stores them as 4"
    ]


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is quantized already.

    Raises:
        UsageError: it is.
    """
    if checkpoint.quantization is not None:
        scheme = checkpoint.quantization.scheme
        raise UsageError(
            f"{checkpoint.path} is quantized already ({checkpoint.quantization.method}, {scheme.bits} bits)",
            fix="quantize the 16-bit checkpoint it was made from",
            param="model",
        )


def _check_device(device: str) -> None:
    """Refuse a device that is not here, or that nothing was written for."""
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:N", param="device")
    if device == "cpu":
        return
    index = device.partition(":")[2]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        found = "torch finds no GPU" if not count else f"torch finds {count}, counted from 0"
        raise UsageError(f"--device {device}: {found}", fix="--device cpu", param="device")


def _tied_head(selection: Selection) -> set[str]:
    """The head's conventional name, where it is no tensor of its own: readers look for it among the dense modules."""
    return set() if any(m.name == "lm_head" for m in selection.modules) else {"lm_head"}


def _needs_g_idx(config: QuantizeConfig) -> bool:
    ordered = "gptq" in config.steps and config.act_order and not config.static_groups
    return ordered and scheme_of(config).group_size != -1


def _check_budget(config: QuantizeConfig) -> None:
    given = "target_bpw" if config.target_bpw is not None else "target_size"
    if "bits" in method_of(config).fixed:
        bits = method_of(config).bits
        raise UsageError(f"--{given.replace('_', '-')}: --method {config.method} has {bits} bits only", param=given)
    if config.bits is not None:
        raise UsageError(
            "--bits: those of each linear are chosen under --target-bpw and --target-size",
            fix="leave --bits out; --override 'NAME:bits=N' settles those of some linears",
            param="bits",
        )
    if config.target_bpw is not None and config.target_size is not None:
        raise UsageError("--target-bpw and --target-size: expected one of them", param="target_size")
    if config.target_bpw is not None and not math.isfinite(config.target_bpw):
        raise UsageError(f"--target-bpw {config.target_bpw}: expected a finite number", param="target_bpw")
    if config.target_size is not None:
        parse_bytes(config.target_size, param="target_size")


def _check_override(config: QuantizeConfig, override: Override) -> None:
    own = method_of(config)
    settled = {"bits": override.bits if override.bits != DENSE_BITS else None, "group_size": override.group_size}
    for name, value in settled.items():
        if name in own.fixed and value not in (None, getattr(own, name)):
            raise UsageError(
                f"--override {override.text}: --method {config.method} has {name.replace('_', '-')} "
                f"{getattr(own, name)} only",
                fix=f"bits={DENSE_BITS} leaves linears as they are",
                param="override",
            )
    if override.bits not in (None, *BITS, DENSE_BITS):
        raise UsageError(
            f"--override {override.text}: bits: expected {', '.join(map(str, BITS))}, or {DENSE_BITS} to leave linears "
            "as they are",
            param="override",
        )


def _check_schemes(given: QuantScheme, schemes: Mapping[str, QuantScheme], selection: Selection) -> None:
    """Refuse a scheme that its linears cannot have; the one given without overrides is refused by its own options."""
    widths: dict[QuantScheme, dict[str, int]] = {}
    for module in selection.modules:
        widths.setdefault(schemes[module.weights[0]], {})[module.name] = module.in_features
    for scheme, of_modules in widths.items():
        try:
            check_scheme(scheme, of_modules)
        except UsageError as error:
            if scheme == given:
                raise
            raise UsageError(
                f"--override: {error.message.removeprefix('--')}", fix=error.fix, param="override"
            ) from error


def _check_experts(graph: Graph, schemes: Mapping[str, QuantScheme]) -> None:
    """Refuse experts of one product that would be quantized in several ways, only some of them, or with act-order
    groups, which nothing here reads."""
    for op in (op for op in graph.ops if op.kind == "grouped_linear"):
        found = {schemes.get(name) for name in op.matrices}
        if any(scheme is not None and scheme.act_order for scheme in found):
            raise UsageError(
                f"--no-static-groups: the experts of '{op.name}' would have act-order groups, which are not read",
                fix="add --static-groups or --no-act-order",
                param="static_groups",
            )
        if len(found) > 1:
            raise UsageError(
                f"--override and --ignore would quantize '{op.name}' in several ways: the experts of a layer are read "
                "where they are alike",
                fix="name the experts of a projection together: '*.experts.*.up_proj'",
                param="override",
            )


def _check_packable(selection: Selection, output: OutputFormat) -> None:
    modules = selection.modules
    refused: dict[str, ValueError] = {}
    for module in modules:
        try:
            output.check(module.name, module.shape)
        except ValueError as error:
            refused[module.name] = error
    if not refused:
        return
    name, first = next(iter(refused.items()))
    if len(refused) == len(modules):
        fix = "choose other --bits or --group-size, or another --format: docs/formats.md says what each holds"
    else:
        fix = f"use another --format, or leave {len(refused)} linears dense: --ignore {name} and so on"
        if len(refused) == 1:
            fix = f"use another --format, or leave it dense with --ignore {name}"
    raise UsageError(f"--format {output.format}: {first}", fix=fix, param="format") from first
