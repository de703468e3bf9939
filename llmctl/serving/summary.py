"""What the terminal shows when the server is ready; stderr only."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmctl.config import ServeConfig
from llmctl.serving.adapters import shown_names
from llmctl.serving.context import Model


def base_url(config: ServeConfig) -> str:
    """Where a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{'https' if config.ssl_certfile else 'http'}://{host}:{config.port}"


def curl_line(config: ServeConfig, model: Model, *, keyed: bool) -> str:
    """A command that asks the server something, with a key if it is ``keyed``."""
    body: dict[str, Any] = {"model": model.name, "max_tokens": 50}
    if model.intake.has_chat_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "completions", "Once upon a time"
    words = ["curl", f"{base_url(config)}/v1/{path}", "-H", "Content-Type: application/json"]
    line = shlex.join([*words, "-d", msgspec.json.encode(body).decode()])
    return line + ' -H "Authorization: Bearer $KEY"' if keyed else line


def print_summary(
    config: ServeConfig, model: Model, engine: Path, seconds: float, *, keyed: bool, adapters: Sequence[str] = ()
) -> None:
    """The engine, the limits, the URL, and a line to try; on a device with memory of its own, what takes how much."""
    info = model.info
    rows = {
        "model": model.name,
        "runs": f"{info.family}, {info.quantization}, {info.dtype}, target {info.target}",
        **({"kernels": info.kernels} if info.kernels else {}),
        "weights": _mib(info.weight_bytes),
        "context": f"{info.max_model_len} tokens",
        "KV cache": f"{info.kv_tokens} tokens, {_mib(info.kv_cache_bytes)} of {info.kv_cache_dtype}",
        "batch": f"up to {info.max_num_seqs} requests, {info.max_num_batched_tokens} tokens a step",
        **({"adapters": _adapters(config, adapters)} if config.enable_lora else {}),
        "sampling": str(model.defaults),
        "tools": _tools(model, config),
        "access": "API key" if keyed else f"open to whoever reaches {config.host}",
        "URL": base_url(config),
        **({"page": f"{base_url(config)}/, to chat with it and to watch it"} if config.ui else {}),
        "API": f"{base_url(config)}/{'docs' if config.ui else 'openapi.json'}",
        "metrics": f"{base_url(config)}/metrics",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))  # a path may have brackets, which are no markup
    console = Console(stderr=True)
    console.print(Panel(table, title=f"llmctl serve: ready in {seconds:.1f} s", expand=False))
    if info.own_memory:
        from llmctl.artifact.memory_table import render

        console.print(render(info.memory, note=info.memory_note), highlight=False)
    # Printed as they are: a wrapped path or command line could not be copied.
    for line in (f"engine: {engine}", f"try: {curl_line(config, model, keyed=keyed)}"):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _adapters(config: ServeConfig, names: Sequence[str]) -> str:
    return f"{shown_names(names) or 'none yet'}; {config.max_loras} at once, of rank up to {config.max_lora_rank}"


def _tools(model: Model, config: ServeConfig) -> str:
    """How calls are found, and who decided it."""
    tools = model.intake.tools
    if config.tool_call_parser or tools.generic:
        why = "--tool-call-parser" if config.tool_call_parser else "--tool-template generic"
    elif not tools.traits.shows_tools:
        return "the chat template does not show them" if model.intake.has_chat_template else "no chat template"
    else:
        why = "by the chat template" if tools.row.signs else "a guess; --tool-call-parser tells"
    return f"calls as {tools.row.name} ({why})"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
