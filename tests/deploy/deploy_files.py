"""What the tests of configs/deploy share: the files, and the settings that a command line in them stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
import yaml

from llmctl.cli.main import app
from llmctl.config import ServeConfig
from llmctl.serving.config_check import check_config
from llmctl.serving.launch import FLUSH_SECONDS
from llmctl.serving.lifecycle import _WORKER_EXIT_SECONDS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "configs" / "deploy"

AFTER_DRAIN = FLUSH_SECONDS + _WORKER_EXIT_SECONDS
"""Seconds that a server may take to end after its drain timeout."""


def serve_settings(command: Sequence[str], config: Path, folder: Path) -> ServeConfig:
    """The settings of a ``serve`` command, parsed and checked by llmctl itself.

    Args:
        command: ``serve`` and its arguments. config: the file that ``--config`` names where it is deployed.
        folder: where a file of keys is written, which ``--api-key-file`` is then made to name.
    """
    assert command[0] == "serve"
    keys = folder / "api-keys"
    keys.write_text(f"test sha256:{hashlib.sha256(b'a key').hexdigest()}\n")
    keys.chmod(0o600)
    here = {"--config": config, "--api-key-file": keys}
    words = [word for argument in command[1:] for word in argument.split("=", 1)]
    arguments = [str(here.get(before, word)) for before, word in zip(["", *words], words, strict=False)]
    serve: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    values = serve.make_context("serve", arguments).params
    settings = ServeConfig(**{field.name: values[field.name] for field in fields(ServeConfig)})
    check_config(settings)
    return settings


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
