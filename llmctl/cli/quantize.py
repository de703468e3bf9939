"""``llmctl quantize``: checkpoint -> quantized checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, is_given, print_json
from llmctl.cli.model_word import with_model_word
from llmctl.config import QuantizeConfig
from llmctl.errors import LlmctlError, UsageError

if TYPE_CHECKING:
    from llmctl.cli.quantize_progress import ProgressLines
    from llmctl.quantize.report import QuantizeReport

_D = QuantizeConfig()
_MODEL, _METHOD, _CALIBRATION, _OUTPUT, _GENERAL = "Model", "Method", "Calibration", "Output", "General"
_LIMITS = "Choice among methods"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A checkpoint folder, a .gguf file, demo:smollm2-135m, or a hub id.",
        rich_help_panel=_MODEL,
    ),
]
MergeAdapter = Annotated[
    list[str],
    typer.Option(
        "--merge-adapter",
        metavar="DIR[=WEIGHT]",
        help="A LoRA adapter that PEFT saved, merged before quantizing; repeatable. A quantized model is dequantized "
        "for it.",
        rich_help_panel=_MODEL,
    ),
]
Ignore = Annotated[
    list[str],
    typer.Option(
        "--ignore",
        metavar="NAME",
        help="Linears to leave at 16 bits: name components (lm_head, layers.0, down_proj) or a glob. "
        "Repeatable; '' for none.",
        rich_help_panel=_MODEL,
    ),
]
Override = Annotated[
    list[str],
    typer.Option(
        "--override",
        metavar="NAME:SETTINGS",
        help="Other settings for some linears, named as for --ignore: '*.down_proj:bits=8', "
        "'layers.0:bits=8,group-size=32', bits=16 to leave them. Repeatable; the last that matches wins.",
        rich_help_panel=_METHOD,
    ),
]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        metavar="BITS",
        help="Choose 3, 4 or 8 bits for each linear, so that they take this many bits a weight, scales included.",
        rich_help_panel=_METHOD,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        metavar="SIZE",
        help="Likewise, so that the output's weights take this much (90MiB, 4GiB).",
        rich_help_panel=_METHOD,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="rtn, awq, gptq, awq+gptq, w8a8, fp8, nf4, or auto: the best of the first three by limits.",
        rich_help_panel=_METHOD,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        help="Keep the smallest of at most this KL from the original.",
        rich_help_panel=_LIMITS,
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        metavar="SIZE",
        help="Keep the nearest to the original of at most this size.",
        rich_help_panel=_LIMITS,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits", help="3 (fewer readers), 4 or 8. Without it: 4, or the method's own.", rich_help_panel=_METHOD
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help="Weights that share a scale; -1 for a whole row. Without it: 64, or the method's own.",
        rich_help_panel=_METHOD,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Fixed or fitted zero points. Without either: fitted for awq, else fixed.",
        rich_help_panel=_METHOD,
    ),
]
DampPercent = Annotated[
    float, typer.Option("--damp-percent", help="GPTQ: damping of the Hessian.", rich_help_panel=_METHOD)
]
ActOrder = Annotated[
    bool,
    typer.Option("--act-order/--no-act-order", help="GPTQ: columns by falling activation.", rich_help_panel=_METHOD),
]
StaticGroups = Annotated[
    bool,
    typer.Option(
        "--static-groups/--no-static-groups",
        help="GPTQ: keep groups contiguous under act-order (no g_idx).",
        rich_help_panel=_METHOD,
    ),
]
Sweeps = Annotated[
    int,
    typer.Option(
        "--sweeps", help="GPTQ: times that all codes and scales are taken back and improved.", rich_help_panel=_METHOD
    ),
]
OriginalTargets = Annotated[
    float,
    typer.Option(
        "--original-targets",
        metavar="SHARE",
        help="GPTQ: how far layers aim at the unquantized model's outputs (GPTAQ) instead of those of their own "
        "weights on their inputs; 0 to 1.",
        rich_help_panel=_METHOD,
    ),
]
Rotate = Annotated[
    bool,
    typer.Option(
        "--rotate",
        help="Spread outliers first: the residual stream and heads' values turned by randomized Hadamard matrices, "
        "folded into the weights. Of models with plain RMS norms.",
        rich_help_panel=_METHOD,
    ),
]
Backend = Annotated[
    str, typer.Option("--backend", help="native, autoawq, auto-gptq or gptqmodel.", rich_help_panel=_METHOD)
]
Calib = Annotated[
    str,
    typer.Option(
        "--calib",
        metavar="SOURCE",
        help="self (the model writes it), a .txt or .jsonl file, or a hub data set NAME[:CONFIG[:SPLIT]].",
        rich_help_panel=_CALIBRATION,
    ),
]
CalibSamples = Annotated[
    int, typer.Option("--calib-samples", help="Calibration sequences.", rich_help_panel=_CALIBRATION)
]
CalibLength = Annotated[int, typer.Option("--calib-length", help="Tokens in each.", rich_help_panel=_CALIBRATION)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", rich_help_panel=_CALIBRATION)]
Output = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Folder to write; NAME.gguf for --format gguf.", rich_help_panel=_OUTPUT
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto (the method's own; awq for --method awq at 4 bits, else gptq), awq (AutoAWQ GEMM), gptq (version 2 "
        "if asymmetric), gptq_v2, compressed-tensors, compressed-tensors-w8a8, bitsandbytes, bitsandbytes-double "
        "(scales in 8 bits) or gguf.",
        rich_help_panel=_OUTPUT,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run of the same options.", rich_help_panel=_OUTPUT)
]
EvalText = Annotated[
    str,
    typer.Option(
        "--eval-text",
        metavar="FILE",
        help="Text for perplexity and KL at the end, its first 2048 tokens; builtin, or none.",
        rich_help_panel=_OUTPUT,
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads.", rich_help_panel=_GENERAL)]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where layers are quantized: cpu, cuda or cuda:N. On a GPU not tried yet; self-written calibration text "
        "and the measurement at the end are the CPU's.",
        rich_help_panel=_GENERAL,
    ),
]


@guarded
@with_model_word
def quantize(
    ctx: typer.Context,
    config: ConfigOption = None,  # noqa: ARG001
    model: Model = _D.model,
    as_family: AsOption = _D.as_family,
    merge_adapter: MergeAdapter = list(_D.merge_adapter),  # noqa: B006
    output: Output = _D.output,
    method: Method = _D.method,
    bits: Bits = _D.bits,
    group_size: GroupSize = _D.group_size,
    symmetric: Symmetric = _D.symmetric,
    format: Format = _D.format,
    calib: Calib = _D.calib,
    calib_samples: CalibSamples = _D.calib_samples,
    calib_length: CalibLength = _D.calib_length,
    seed: Seed = _D.seed,
    damp_percent: DampPercent = _D.damp_percent,
    act_order: ActOrder = _D.act_order,
    static_groups: StaticGroups = _D.static_groups,
    sweeps: Sweeps = _D.sweeps,
    original_targets: OriginalTargets = _D.original_targets,
    rotate: Rotate = _D.rotate,
    ignore: Ignore = list(_D.ignore),  # noqa: B006
    override: Override = list(_D.override),  # noqa: B006
    target_bpw: TargetBpw = _D.target_bpw,
    target_size: TargetSize = _D.target_size,
    max_kl: MaxKl = _D.max_kl,
    max_size: MaxSize = _D.max_size,
    backend: Backend = _D.backend,
    eval_text: EvalText = _D.eval_text,
    resume: Resume = _D.resume,
    threads: Threads = _D.threads,
    device: Device = _D.device,
    json_output: JsonOption = False,
) -> None:
    """Quantize a model to 3, 4 or 8 bits, layer by layer, into a checkpoint that others read.

    [bold]llmctl quantize --model demo:smollm2-135m --method awq --bits 4 --output ./smollm2-awq[/bold]

    [bold]llmctl quantize compare[/bold] makes several and measures them.
    """
    from llmctl.targets.address_space import check_torch

    check_torch("llmctl quantize")
    from llmctl.cli.quantize_progress import ProgressLines, print_report
    from llmctl.evaluate.eval_text import read_text
    from llmctl.quantize.backends import run_backend
    from llmctl.quantize.plan import check_options
    from llmctl.quantize.report_files import write_report_files

    settings = QuantizeConfig(
        model=model,
        as_family=as_family,
        merge_adapter=tuple(merge_adapter),
        output=output,
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        format=format,
        calib=calib,
        calib_samples=calib_samples,
        calib_length=calib_length,
        seed=seed,
        damp_percent=damp_percent,
        act_order=act_order,
        static_groups=static_groups,
        sweeps=sweeps,
        original_targets=original_targets,
        rotate=rotate,
        ignore=tuple(name for name in ignore if name),
        override=tuple(override),
        target_bpw=target_bpw,
        target_size=target_size,
        max_kl=max_kl,
        max_size=max_size,
        backend=backend,
        eval_text=eval_text,
        resume=resume,
        threads=threads,
        device=device,
    )
    text = read_text(settings.eval_text)
    with ProgressLines() as progress:
        if settings.method == "auto":
            report: QuantizeReport = _choose(settings, progress)
        else:
            check_options(settings)
            if unused := _unused(ctx, settings):
                progress.note(f"not used by --method {method}: {', '.join(unused)}")
            report = run_backend(settings, progress)
        if text is not None:
            report = _judged(report, settings, text, progress)
        chart: Path | None = None
        try:
            chart = write_report_files(report, Path(settings.output))[-1]
        except OSError as error:  # the output is in place
            progress.note(f"warning: the report's files are not written: {error.strerror or error}")
    if json_output:
        print_json(report.to_json())
    else:
        print_report(report, chart)


def _judged(report: QuantizeReport, settings: QuantizeConfig, text: str, progress: ProgressLines) -> QuantizeReport:
    """The report with what was done to the model's predictions; a measurement that fails is a line, for the output is
    in place."""
    from llmctl.quantize.quality import measure_quality

    progress.note(f"measuring perplexity and KL on {settings.eval_text} (--eval-text)")
    try:
        return replace(report, quality=measure_quality(settings, report.format, text, progress.judging))
    except LlmctlError as error:
        progress.note(f"warning: perplexity and KL are not measured: {error.message}")
        return report


def _unused(ctx: typer.Context, settings: QuantizeConfig) -> list[str]:
    """Options that are given and that the method has no use for."""
    from llmctl.quantize.methods import unused_options

    return ["--" + name.replace("_", "-") for name in unused_options(settings) if is_given(ctx, name)]


def _choose(settings: QuantizeConfig, progress: ProgressLines) -> QuantizeReport:
    """``--method auto``; who else was tried is told on stderr."""
    from llmctl.bench.config import CompareConfig
    from llmctl.bench.progress import Progress
    from llmctl.bench.quantizations import Shown, choose_method
    from llmctl.quantize.grid import BITS

    if settings.backend != "native" or settings.resume:
        option = "--resume" if settings.resume else f"--backend {settings.backend}"
        raise UsageError(f"--method auto: has no {option}", fix=f"leave {option} out", param="method")
    if settings.merge_adapter:
        raise UsageError(
            "--method auto: has no --merge-adapter",
            fix=f"llmctl merge {settings.model} {' '.join(settings.merge_adapter)} --output DIR, then quantize DIR",
            param="merge_adapter",
        )
    shown = Shown(progress, progress.evaluating, Progress)
    bits: tuple[int, ...] | None = None if settings.has_budget else BITS
    if settings.bits is not None:
        bits = (settings.bits,)
    report, found = choose_method(CompareConfig(base=settings, bits=bits), shown)
    for i, candidate in enumerate(found.candidates):
        kept = ", kept" if i == found.winner else ""
        progress.note(f"{candidate.label}: {candidate.size / 2**20:.1f} MiB, KL {candidate.kl:.4g}{kept}")
    for name, why in found.refused.items():
        progress.note(f"{name}: {why}")
    return report
