"""The report that lies with a quantized checkpoint: ``quantize_report.json``, ``.md`` and ``.svg``.

Nothing in it depends on the clock or on where the output lies: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmctl.quantize.error_chart import error_chart
from llmctl.quantize.report import QuantizeReport
from llmctl.quantize.workfolder import write_text


def report_stem(output: Path) -> Path:
    """What the report's files are named but for their suffix: in a folder, or beside a file."""
    return output / "quantize_report" if output.is_dir() else output.with_name(f"{output.stem}.report")


def write_report_files(report: QuantizeReport, output: Path) -> list[Path]:
    """Write the three files; their paths.

    Raises:
        OSError: no room, say; the checkpoint is not touched.
    """
    stem = report_stem(output)
    texts = {".json": json.dumps(_lasting(report), indent=2) + "\n", ".md": _markdown(report), ".svg": _chart(report)}
    paths = []
    for suffix, text in texts.items():
        paths.append(stem.with_name(stem.name + suffix))
        write_text(paths[-1], text)
    return paths


def _lasting(report: QuantizeReport) -> dict[str, Any]:
    document = report.to_json()
    for gone in ("seconds", "output"):
        del document[gone]
    if document["quality"] is not None:
        del document["quality"]["seconds"]
    document["layers"] = [{k: v for k, v in layer.items() if k != "seconds"} for layer in document["layers"]]
    return document


def _kind(linear: str) -> str:
    return linear.rpartition(".")[2]


def _chart(report: QuantizeReport) -> str:
    errors: dict[str, dict[int, float]] = {}
    for layer in report.layers:
        for linear, error in layer.modules.items():
            errors.setdefault(_kind(linear), {})[layer.layer] = error
    return error_chart(f"{report.method}: relative squared error of each linear's {report.error_of}", errors)


def _markdown(report: QuantizeReport) -> str:
    return "\n".join([
        f"# {report.model}: {report.method}, {report.widths} bits",
        "",
        *_table([("linears", "number"), *((scheme, str(count)) for scheme, count in sorted(report.schemes.items()))]),
        *_table([("", "before, 16 bits", "after"), *_sizes(report)]),
        *_quality(report),
        f"## Relative squared error of each linear's {report.error_of}",
        "",
        *_table(list(_layers(report))),
    ])  # fmt: skip


def _sizes(report: QuantizeReport) -> Iterator[tuple[str, ...]]:
    for name, part in report.parts.items():
        yield name, f"{part.size_16bit:,}", f"{part.size_after:,}"
    yield "all, bytes", f"{report.size_16bit:,}", f"{report.size_after:,}"
    yield "bits per weight", "16", f"{report.bits_per_weight_model:.2f}"


def _quality(report: QuantizeReport) -> list[str]:
    quality = report.quality
    if quality is None:
        return []
    rows = [
        ("perplexity", f"{quality.perplexity_before:.4f}", f"{quality.perplexity_after:.4f}"),
        ("KL, nats a token", "0", f"{quality.divergence.kl:.5f}"),
        ("top-1 agreement", "1", f"{quality.divergence.top1:.4f}"),
    ]
    return [f"## On {quality.sentence}", "", *_table([("", "before", "after"), *rows])]


def _layers(report: QuantizeReport) -> Iterator[tuple[str, ...]]:
    kinds = list(dict.fromkeys(_kind(linear) for layer in report.layers for linear in layer.modules))
    yield ("layer", *kinds, "mean")
    for layer in report.layers:
        errors = {_kind(linear): f"{error:.2e}" for linear, error in layer.modules.items()}
        yield (str(layer.layer), *(errors.get(kind, "") for kind in kinds), f"{layer.error:.2e}")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:], ""]
