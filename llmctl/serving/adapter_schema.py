"""Request bodies of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, by vLLM's names."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llmctl.serving.protocol import ApiModel

_MOST_NAME = 256
Name = Annotated[str, Field(min_length=1, max_length=_MOST_NAME, description="The adapter's name as a model.")]


class LoadAdapterRequest(ApiModel):
    """``POST /v1/load_lora_adapter``."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, description="A folder below `--lora-dir`.")]
    load_inplace: Annotated[bool, Field(description="Replace an adapter of the same name.")] = False


class UnloadAdapterRequest(ApiModel):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: Name
