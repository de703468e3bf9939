"""Sampling parameters of requests that bring none: ``--generation-config``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import UsageError

log = logging.getLogger("llmctl.serving")

FILE_NAME = "generation_config.json"
OWN, NONE = "auto", "vllm"
"""Values of ``--generation-config`` that are no path: what the model recommends; OpenAI's defaults, as vLLM's word."""
DEFAULTABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FIELDS = {**{name: name for name in DEFAULTABLE}, "max_new_tokens": "max_tokens"}


@dataclass(frozen=True)
class SamplingDefaults:
    """Values of SamplingParams by name, and where they come from; nothing: OpenAI's defaults."""

    values: Mapping[str, Any]
    source: str = ""

    def __str__(self) -> str:
        if not self.values:
            return "OpenAI's defaults"
        return ", ".join(f"{name} {value}" for name, value in self.values.items()) + f" ({self.source})"


def sampling_defaults(choice: str, engine: Path) -> SamplingDefaults:
    """The defaults of an engine folder, by ``--generation-config``.

    A model's own that are out of range are passed over with a warning.

    Raises:
        UsageError: as ``given_defaults``.
    """
    given = given_defaults(choice)
    if given is not None:
        return given
    own = engine / FILE_NAME
    if own.is_file():
        try:
            found = _of_document(_read(own))
        except (ValueError, TypeError) as error:
            log.warning("the model's %s: its sampling parameters are ignored: %s", FILE_NAME, error)
            return SamplingDefaults({})
        if found:
            return SamplingDefaults(found, f"the model's {FILE_NAME}")
    return SamplingDefaults({})


def given_defaults(choice: str) -> SamplingDefaults | None:
    """The defaults that ``--generation-config`` itself settles; None: the model's own are wanted.

    Raises:
        UsageError: no such file, not a JSON object, or a value out of range.
    """
    if choice == OWN:
        return None
    if choice == NONE:
        return SamplingDefaults({})
    path = Path(choice).expanduser()
    path = path / FILE_NAME if path.is_dir() else path
    try:
        found = _of_document(_read(path))
    except OSError as error:
        raise UsageError(
            f"--generation-config {choice}: {error.strerror or error}",
            fix=f"name a folder with a {FILE_NAME}, or {OWN} or {NONE}",
            param="generation_config",
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"--generation-config {path}: {error}", param="generation_config") from error
    return SamplingDefaults(found, str(path))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _of_document(document: Any) -> dict[str, Any]:
    """Of transformers' generation config what SamplingParams has.

    Raises:
        TypeError: not an object. RequestError: a value out of range.
    """
    if not isinstance(document, dict):
        raise TypeError(f"expected a JSON object, found {type(document).__name__}")
    found = {ours: document[theirs] for theirs, ours in _FIELDS.items() if document.get(theirs) is not None}
    if document.get("do_sample") is False:  # transformers samples greedily then, whatever temperature stands there
        found.pop("temperature", None)
    SamplingParams(**found)
    return found
