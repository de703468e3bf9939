"""Quality as ``llmctl eval`` measures it, judged by its limits; in its own command, and beside speed in a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.bench.gate import Gate, Slo, check, parse_share
from llmctl.config import EvalConfig, load_yaml_options
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from llmctl.evaluate.evaluation import Evaluation


def check_limits(settings: EvalConfig) -> None:
    """Refuse limits that cannot be held.

    Raises:
        UsageError: a limit of two models without the other one, or one that is no number or no share.
    """
    for name in ("max_kl", "max_delta_nll", "min_agreement"):
        value, option = getattr(settings, name), "--" + name.replace("_", "-")
        if value is None:
            continue
        if not settings.against:
            raise UsageError(f"{option}: is of two models", fix="name the other one: --against MODEL", param=name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{option}: expected a finite number, found {value}", param=name)
    if settings.min_agreement is not None and (share := parse_share(settings.min_agreement, "min_agreement")) > 1:
        raise UsageError(f"--min-agreement: expected a share up to 100%, found {share:.0%}", param="min_agreement")


def quality_gates(settings: EvalConfig, found: Evaluation) -> list[Gate]:
    """A gate for each limit."""
    wanted = [("kl", "<=", settings.max_kl), ("delta_nll", "<=", settings.max_delta_nll)]
    if settings.min_agreement is not None:
        wanted.append(("top1_agreement", ">=", parse_share(settings.min_agreement, "min_agreement")))
    figures = found.figures()
    return [check(Slo(name, op, limit), figures) for name, op, limit in wanted if limit is not None]


def read_settings(path: Path) -> EvalConfig:
    """Options of ``llmctl eval`` from a YAML file, as its ``--config`` reads them; the model is left open.

    Raises:
        UsageError: unreadable, an unknown option, one that names the model, or a value of another type.
    """
    try:
        known = {field.name: field for field in fields(EvalConfig)}
        options = load_yaml_options(path, known)
        if options.pop("model", None) is not None:
            raise UsageError(f"--config {path}: model: the sweep's own is measured", param="quality")
        settings = replace(EvalConfig(), **{name: _typed(path, name, value) for name, value in options.items()})
        check_limits(settings)
    except UsageError as error:
        message = error.message.replace(f"--config {path}", f"--quality {path}")
        if not message.startswith("--quality"):
            message = f"--quality {path}: {message}"
        raise UsageError(message, fix=error.fix, param="quality") from None
    return settings


_TYPES: Mapping[str, tuple[type[Any], ...]] = {
    **dict.fromkeys(("context", "stride", "windows", "max_tokens"), (int,)),
    **dict.fromkeys(("max_kl", "max_delta_nll"), (int, float)),
    "min_agreement": (str, int, float),
}


def _typed(path: Path, name: str, value: Any) -> Any:
    types = _TYPES.get(name, (str,))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, types):
        wanted = {str: "text", int: "a whole number", float: "a number"}[types[-1]]
        raise UsageError(f"--quality {path}: {name.replace('_', '-')}: expected {wanted}, found {value!r}")
    if name == "min_agreement":
        return str(value)
    return float(value) if name in ("max_kl", "max_delta_nll") else value
