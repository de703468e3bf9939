"""``llmctl eval``: a model on a text, alone or against another, with gates."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, print_json
from llmctl.config import EvalConfig

if TYPE_CHECKING:
    from llmctl.bench.gate import Gate
    from llmctl.evaluate.evaluation import Evaluation

_D = EvalConfig()
_TEXT, _GATE = "Text", "Gates (exit code 4)"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint folder, dense or quantized; a .gguf file, demo:smollm2-135m, a hub id, or an engine folder.",
        show_default=False,
    ),
]
Against = Annotated[
    str,
    typer.Option(
        "--against", metavar="MODEL", help="Compare with this one: the original, say.", rich_help_panel="Model"
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        help="int8 rounds MODEL's inputs of symmetric 5- to 8-bit linears, as such engines do; auto does not.",
        rich_help_panel="Model",
    ),
]
Text = Annotated[
    str, typer.Option("--text", metavar="FILE", help="UTF-8 text; builtin is a novel's.", rich_help_panel=_TEXT)
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", metavar="TOKENS", help="Tokens in a window; by default 1024, or what fits.", rich_help_panel=_TEXT
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        "--stride",
        metavar="TOKENS",
        help="From one window to the next, which then scores so many; by default the context: no overlap.",
        rich_help_panel=_TEXT,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option("--windows", metavar="N", help="N windows spread over the text instead.", rich_help_panel=_TEXT),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="TOKENS", help="Use the text's first so many.", rich_help_panel=_TEXT),
]
MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", metavar="NATS", help="Most KL(--against || MODEL) a token.", rich_help_panel=_GATE),
]
MaxDeltaNll = Annotated[
    float | None,
    typer.Option(
        "--max-delta-nll",
        metavar="NATS",
        help="Most that its mean NLL is above --against's.",
        rich_help_panel=_GATE,
    ),
]
MinAgreement = Annotated[
    str | None,
    typer.Option(
        "--min-agreement",
        metavar="SHARE",
        help="Least share of tokens where both find the same one most likely: 95%.",
        rich_help_panel=_GATE,
    ),
]


@guarded
def evaluate(
    model: Model = _D.model,
    against: Against = _D.against,
    as_family: AsOption = _D.as_family,
    activations: Activations = _D.activations,
    text: Text = _D.text,
    context: Context = _D.context,
    stride: Stride = _D.stride,
    windows: Windows = _D.windows,
    max_tokens: MaxTokens = _D.max_tokens,
    max_kl: MaxKl = _D.max_kl,
    max_delta_nll: MaxDeltaNll = _D.max_delta_nll,
    min_agreement: MinAgreement = _D.min_agreement,
    config: ConfigOption = None,  # noqa: ARG001
    json_output: JsonOption = False,
) -> None:
    """Perplexity of a model on a text; with --against, how far its next-token distributions are from another's.

    Checkpoints are computed in float32, a layer at a time; engines as they are built.

    Example: [bold]llmctl eval ./smollm2-awq --against demo:smollm2-135m --text wiki.txt --max-kl 0.1[/bold]
    """
    settings = EvalConfig(
        model=model,
        as_family=as_family,
        against=against,
        activations=activations,
        text=text,
        context=context,
        stride=stride,
        windows=windows,
        max_tokens=max_tokens,
        max_kl=max_kl,
        max_delta_nll=max_delta_nll,
        min_agreement=min_agreement,
    )
    from llmctl.bench.quality import check_limits, quality_gates
    from llmctl.targets.address_space import check_torch

    check_limits(settings)

    check_torch("llmctl eval")
    from llmctl.artifact.step_progress import step_progress
    from llmctl.bench.gate import exit_code
    from llmctl.bench.verdict import sentence
    from llmctl.evaluate import evaluation

    with step_progress() as show:
        found = evaluation.evaluate(settings, show)
    gates = quality_gates(settings, found)
    if json_output:
        print_json({**found.to_json(), "gates": [gate.as_dict() for gate in gates]})
    else:
        _print_table(found, gates)
    for gate in gates:
        if not gate.passed:
            print(f"gate failed: {sentence(gate.as_dict(), {})}", file=sys.stderr)
    if code := exit_code(gates):
        raise typer.Exit(int(code))


def _print_table(found: Evaluation, gates: list[Gate]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llmctl.bench.verdict import sentence

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    protocol, figures, compared = found.protocol, found.figures(), found.divergence is not None
    rows = [("model", f"{found.model} ({found.arithmetic})")]
    if compared:
        rows.append(("against", f"{found.against} ({found.against_arithmetic})"))
    rows += [
        ("text", protocol.sentence),
        ("hashes", f"tokens {protocol.text_sha256[:12]}, tokenizer {protocol.tokenizer_sha256[:12]}"),
        (
            "perplexity",
            f"{found.perplexity:.4f}" + (f" (was {figures['original_perplexity']:.4f})" if compared else ""),
        ),
    ]
    if compared:
        rows += [
            ("ΔNLL", f"{_plus_minus(figures, 'delta_nll', '+')} nats a token"),
            ("KL", f"{_plus_minus(figures, 'kl')} nats a token, KL(against || model)"),
            ("top-1", f"{figures['top1_agreement']:.2%} agreement"),
        ]
    rows += [("gate", f"{sentence(gate.as_dict(), {})}, {'passed' if gate.passed else 'failed'}") for gate in gates]
    rows.append(("time", f"{found.seconds:.1f} s"))
    for key, value in rows:
        table.add_row(key, value)
    Console(width=None if sys.stdout.isatty() else 80).print(table, highlight=False)


def _plus_minus(figures: dict[str, float | None], name: str, sign: str = "") -> str:
    """A figure with its standard error over windows, or what keeps it from having one."""
    error = figures[f"{name}_error"]
    return f"{figures[name]:{sign}.5f}" + (" (one window)" if error is None else f" ± {error:.5f}")
