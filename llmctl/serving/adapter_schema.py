"""Request bodies of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, by vLLM's names."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llmctl.serving.adapters import MOST_NAME, NAME
from llmctl.serving.protocol import ApiModel

Name = Annotated[
    str, Field(max_length=MOST_NAME, pattern=NAME, description="As a model: printable, and without commas.")
]


class LoadAdapterRequest(ApiModel):
    """``POST /v1/load_lora_adapter``."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, description="A folder below `--lora-dir`.")]
    load_inplace: Annotated[bool, Field(description="Replace an adapter of the same name.")] = False


class UnloadAdapterRequest(ApiModel):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: Name
