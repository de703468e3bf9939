"""Checkpoints whose ``model_type`` no row of the family table has: what they fit, and how a user has them read.

Many new names are an old architecture: same settings, same tensors. That shows in the files; that their code computes
the same does not, so a family is offered and never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.checkpoint import hf_folder
from llmctl.checkpoint.accounting import Contents, account
from llmctl.checkpoint.text_config import text_model_config
from llmctl.errors import LlmctlError, UnsupportedModelError, UsageError
from llmctl.graph.families import build_graph
from llmctl.graph.family_table import FAMILIES
from llmctl.graph.hf_config import config_as, is_whole


def read_as(config: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
    """The config as that of ``family``, for ``--as``.

    Args:
        where: config.json, for messages.

    Raises:
        UsageError: no such family, or the config's own is known.
    """
    known = ", ".join(sorted(FAMILIES))
    if family not in FAMILIES:
        raise UsageError(f"--as: expected one of {known}, found '{family}'", param="as_family")
    stored = config["model_type"]
    if stored in FAMILIES and stored != family:
        raise UsageError(
            f"--as {family}: {where} says model_type '{stored}', which is known and read as what it is",
            fix="leave --as out",
            param="as_family",
        )
    return config_as(config, FAMILIES[family])


def is_unknown(model: Path) -> bool:
    """Whether a folder is a checkpoint of a family that is not known. GGUF files are of their own, or refused.

    Raises:
        CheckpointError: as ``hf_folder.read_config`` and ``text_model_config``.
    """
    if not model.is_dir():
        return False
    config = text_model_config(hf_folder.read_config(model), str(model / "config.json"))
    return config["model_type"] not in FAMILIES


def refuse_unknown_family(checkpoint: Contents) -> None:
    """Nothing if the family is known.

    Raises:
        UnsupportedModelError: it is not; with the families that the checkpoint's settings and tensors equal.
    """
    stored = checkpoint.config["model_type"]
    if stored in FAMILIES:
        return
    fitting = [name for name in FAMILIES if _fits(checkpoint, name)]
    if not fitting:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"config.json: model_type '{stored}' is not supported; known families: {known}")
    raise UnsupportedModelError(
        f"config.json: model_type '{stored}' is not supported, though every setting and tensor is one that "
        f"{' or '.join(fitting)} has",
        fix=f"if its code computes the same: --as {fitting[0]}",
    )


def _fits(checkpoint: Contents, family: str) -> bool:
    """Whether every setting is understood as the family's, and every tensor used or superfluous there."""
    config = config_as(checkpoint.config, FAMILIES[family])
    if not is_whole(config):
        return False
    try:
        graph = build_graph(config, lambda name: checkpoint.describe(name) if checkpoint.has(name) else None)
        return not any(kind.notable for kind in account(checkpoint, graph))
    except LlmctlError:
        return False
