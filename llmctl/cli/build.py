"""``llmctl build``: checkpoint -> engine folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, print_json
from llmctl.cli.model_word import with_model_word
from llmctl.config import BuildConfig

if TYPE_CHECKING:
    from llmctl.artifact.plan import BuildPlan

_D = BuildConfig()

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A checkpoint folder (dense, AWQ or GPTQ), a .gguf file, demo:smollm2-135m, or a hub id.",
        rich_help_panel="Model",
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Engine folder; an engine there is replaced.", rich_help_panel="Output"
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="cpu (or cpu:amx,avx512bf16,avx512vnni,avx2,portable), reference, cuda (this machine's GPU), or "
        "cuda:sm_80,sm_90 (built without a GPU).",
        rich_help_panel="Target",
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="auto, float32, float16 or bfloat16: what it computes in.", rich_help_panel="Target"),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        metavar="TOKENS",
        help="Longest sequence; the model's own by default.",
        rich_help_panel="Memory",
    ),
]
BlockSize = Annotated[
    int, typer.Option("--block-size", metavar="TOKENS", help="Tokens a KV-cache block.", rich_help_panel="Memory")
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        help="auto; cpu: bfloat16, float32, int8; cuda: the dtype, int8, fp8; reference: the float types. The default "
        "of serve and bench, which may choose another on cpu and cuda.",
        rich_help_panel="Memory",
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        help="auto, or int8: linears of symmetric weights of 5 to 8 bits take int8 rows (cpu always does).",
        rich_help_panel="Target",
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="What the engine may use, such as 8GiB: what does not fit is refused. Without it --dry-run alone refuses, "
        "by a share of the GPU's memory for cuda where there is one, else of the machine's that is available now.",
        rich_help_panel="Memory",
    ),
]
LmHead = Annotated[
    str,
    typer.Option(
        "--lm-head",
        help="Output head of a cpu engine: dense, int8 or int4; auto: int8 when the model is quantized.",
        rich_help_panel="Target",
    ),
]
EvalText = Annotated[
    str,
    typer.Option(
        "--eval-text",
        metavar="FILE",
        help="Text that the precisions of a cpu engine's output head are compared on: a file, builtin, or none.",
        rich_help_panel="Output",
    ),
]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--passes", metavar="NAME", help="Graph passes, repeatable; 'none' for none.", rich_help_panel="Target"
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the memory plan and write nothing; reads headers only. Exit code 1 if it does not fit.",
        rich_help_panel="Output",
    ),
]


@guarded
@with_model_word
def build(
    model: Model = _D.model,
    as_family: AsOption = _D.as_family,
    output: Output = _D.output,
    target: Target = _D.target,
    dtype: Dtype = _D.dtype,
    activations: Activations = _D.activations,
    lm_head: LmHead = _D.lm_head,
    eval_text: EvalText = _D.eval_text,
    passes: Passes = None,
    max_model_len: MaxModelLen = _D.max_model_len,
    block_size: BlockSize = _D.block_size,
    kv_cache_dtype: KvCacheDtype = _D.kv_cache_dtype,
    memory_budget: MemoryBudget = _D.memory_budget,
    dry_run: DryRun = _D.dry_run,
    config: ConfigOption = None,  # noqa: ARG001
    json_output: JsonOption = False,
) -> None:
    """Build a checkpoint into an engine: fused graph, packed weights, compiled kernels, one checked folder.

    Example: [bold]llmctl build --model ./model-awq --target cpu --output ./engine[/bold]
    """
    settings = BuildConfig(
        model=model,
        as_family=as_family,
        output=output,
        target=target,
        dtype=dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_cache_dtype=kv_cache_dtype,
        activations=activations,
        lm_head=lm_head,
        eval_text=eval_text,
        passes=tuple(passes) if passes else None,
        dry_run=dry_run,
        memory_budget=memory_budget,
    )
    if dry_run:
        _print_plan(settings, json_output)
        return
    from llmctl.targets.address_space import check_torch

    check_torch("llmctl build")
    from llmctl.cli.build_run import run_build

    run_build(settings, json_output)


def _print_plan(settings: BuildConfig, json_output: bool) -> None:
    from llmctl.artifact.plan import check_fits, plan_build

    plan = plan_build(settings)
    if json_output:
        print_json(plan_document(plan))
    else:
        _print_tables(plan)
    check_fits(plan, settings.model)


def _print_tables(plan: BuildPlan) -> None:
    from rich.console import Console

    from llmctl.artifact.memory import human_bytes
    from llmctl.artifact.memory_table import memory_rows, render

    memory, console = plan.memory, Console()
    console.print(
        f"{plan.name} for {plan.target.name}, {plan.options.dtype}: engine folder with "
        f"{human_bytes(plan.weights_bytes)} of weights",
        highlight=False,
    )
    note = f"budget: {memory.budget_source}; largest --max-model-len: {memory.largest_max_model_len}"
    console.print(render(memory_rows(plan.sizing, memory), note=note), highlight=False)


def plan_document(plan: BuildPlan) -> dict[str, Any]:
    """The plan of a build as JSON data; sizes in bytes."""
    from llmctl.artifact.memory_table import memory_document

    memory = plan.memory
    return {
        "model": plan.name,
        "family": plan.graph.family,
        "target": str(plan.target.name),
        "dtype": plan.options.dtype,
        "weights_stored_bytes": plan.weights_bytes,
        **memory_document(plan.sizing, memory),
    }
