"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, as vLLM has them."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llmctl.errors import LlmctlError, PermissionDeniedError, RequestError
from llmctl.serving.adapter_schema import LoadAdapterRequest, UnloadAdapterRequest
from llmctl.serving.adapters import AdapterModule, path_below
from llmctl.serving.body import parse
from llmctl.serving.context import ServerContext, context_of


async def load(request: Request) -> Response:
    """Load an adapter, and offer it as a model.

    Raises:
        LlmctlError: refused: not allowed here, a name that is taken, a folder that cannot be served.
    """
    context = context_of(request)
    body = await parse(request, LoadAdapterRequest, lambda _: None)
    path = await asyncio.to_thread(path_below, _lora_dir(context), body.lora_path)
    context.model()  # nothing may wait between these and the load: a name is taken once
    adapters, name = context.client.adapters, body.lora_name
    if name in context.names:
        raise RequestError(f"lora_name: '{name}' is the model's own name", param="lora_name")
    if adapters.find(name) is not None and not body.load_inplace:
        raise RequestError(
            f"lora_name: '{name}' is loaded already",
            fix="unload it first, or set load_inplace to replace it",
            param="lora_name",
        )
    try:
        await adapters.load(AdapterModule(name, path))
    except LlmctlError as error:
        if error.http_status != 500:
            raise
        raise RequestError(error.message, fix=error.fix, param="lora_path") from error  # what was given is at fault
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(request: Request) -> Response:
    """Offer an adapter no more; its requests end first.

    Raises:
        LlmctlError: refused: not allowed here, no such adapter.
    """
    context = context_of(request)
    body = await parse(request, UnloadAdapterRequest, lambda _: None)
    _lora_dir(context)
    context.model()
    adapter = context.client.adapters.unload(body.lora_name)
    left = context.client.requests_of(adapter)
    said = f"; {left} of its requests are answered first" if left else ""
    return PlainTextResponse(f"Success: LoRA adapter '{adapter.name}' removed successfully{said}.")


def _lora_dir(context: ServerContext) -> str:
    if context.config.lora_dir is None:
        raise PermissionDeniedError(
            "the server was not started with --enable-lora and --lora-dir",
            fix="its adapters are those of --lora-modules",
        )
    return context.config.lora_dir
