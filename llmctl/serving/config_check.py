"""What ``llmctl serve`` refuses of its settings: before anything is started, and once it knows the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from llmctl.config import ServeConfig, itl_target_seconds, parse_bytes
from llmctl.errors import UsageError
from llmctl.serving.model_names import served_names

_METRICS_PREFIX = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
_ROOT_PATH = re.compile(r"(/[\w.~-]+)+")
_LOG_LEVELS = ("debug", "info", "warning", "error")


def check_config(config: ServeConfig) -> None:
    """Refuse, before anything is started, what could only fail later.

    Raises:
        UsageError: an option out of its range, or a file that is not there.
    """
    from llmctl.artifact.request import EngineRequest

    if not config.model:
        raise UsageError("--model is required", fix="llmctl serve --model demo:smollm2-135m", param="model")
    from llmctl.engine.pooling import Pooling
    from llmctl.engine.waiting_queue import POLICIES
    from llmctl.serving.addresses import parse_origins
    from llmctl.serving.sampling_defaults import given_defaults

    choices = {"log_level": _LOG_LEVELS, "scheduling_policy": POLICIES, "pooling": tuple(Pooling)}
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            option = name.replace("_", "-")
            raise UsageError(f"--{option}: expected {', '.join(allowed)}, found '{value}'", param=name)
    EngineRequest.of(config)
    itl_target_seconds(config.itl_target)
    given_defaults(config.generation_config)
    _check_deadline(config)
    _check_parsers(config)
    if not _METRICS_PREFIX.fullmatch(config.metrics_prefix):
        raise UsageError(
            f"--metrics-prefix: expected letters, digits and underscores, no digit first, found "
            f"'{config.metrics_prefix}'",
            fix="--metrics-prefix vllm; the colon after it is added",
            param="metrics_prefix",
        )
    _check_adapters(config)
    _check_threads(config)
    if config.max_body is not None:
        parse_bytes(config.max_body, param="max_body")
    if config.api_key is not None and not config.api_key.strip(", "):
        raise UsageError("--api-key is empty", fix="leave it out to serve without a key", param="api_key")
    if config.priority_keys is not None and not config.priority_keys.strip(", "):
        raise UsageError("--priority-keys is empty", fix="leave it out", param="priority_keys")
    if config.request_log_text and config.request_log is None:
        raise UsageError("--request-log-text needs --request-log", param="request_log_text")
    if config.otlp_traces_endpoint is not None:
        from llmctl.serving.tracing import traces_url

        traces_url(config.otlp_traces_endpoint)
    if config.ssl_certfile and not config.ssl_keyfile:
        raise UsageError("--ssl-certfile needs --ssl-keyfile", param="ssl_keyfile")
    if config.ssl_keyfile and not config.ssl_certfile:
        raise UsageError("--ssl-keyfile needs --ssl-certfile", param="ssl_certfile")
    if config.allowed_origins is not None:
        parse_origins(config.allowed_origins)
    if config.root_path and not _ROOT_PATH.fullmatch(config.root_path):
        raise UsageError(
            f"--root-path: expected a path such as /llm, found '{config.root_path}'",
            fix="a slash at the beginning, none at the end",
            param="root_path",
        )
    if not all(config.served_model_name):
        raise UsageError("--served-model-name is empty", fix="leave it out", param="served_model_name")
    for name in ("ssl_keyfile", "ssl_certfile", "chat_template"):
        file = getattr(config, name)
        if file is not None and not Path(file).is_file():
            raise UsageError(f"--{name.replace('_', '-')} {file}: no such file", param=name)


def _check_threads(config: ServeConfig) -> None:
    from llmctl.serving.worker_settings import Processors

    cpus = Processors.of(config).cpus
    if cpus and config.threads is not None and config.threads > len(cpus):
        raise UsageError(
            f"--threads: expected at most {len(cpus)}, as many as --worker-cpus {config.worker_cpus} has, found "
            f"{config.threads}",
            fix="leave it out",
            param="threads",
        )


def _check_adapters(config: ServeConfig) -> None:
    from llmctl.artifact.request import check_lora_enabled
    from llmctl.serving.adapters import parse_modules

    check_lora_enabled(config, {"lora_modules": bool(config.lora_modules), "lora_dir": config.lora_dir is not None})
    if config.lora_modules:
        parse_modules(config.lora_modules, served_names(config))
    if config.lora_dir is not None and not Path(config.lora_dir).is_dir():
        raise UsageError(f"--lora-dir {config.lora_dir}: no such folder", param="lora_dir")


def _check_deadline(config: ServeConfig) -> None:
    from llmctl.engine.deadline import Deadline

    Deadline.parse(config.deadline, "--deadline")
    for name, given in {"deadline": config.deadline is not None, "shed": config.shed}.items():
        if given and config.scheduling_policy == "fcfs":
            raise UsageError(
                f"--{name}: the scheduling policy fcfs knows no deadlines",
                fix="--scheduling-policy fair or priority",
                param=name,
            )


def _check_parsers(config: ServeConfig) -> None:
    from llmctl.serving.tools.generic_prompt import ROW
    from llmctl.serving.tools.support import TOOL_TEMPLATES
    from llmctl.text.output_parser.formats import reasoning_format, tool_format

    if config.tool_template not in TOOL_TEMPLATES:
        raise UsageError(
            f"--tool-template: expected {', '.join(TOOL_TEMPLATES)}, found '{config.tool_template}'",
            param="tool_template",
        )
    if config.reasoning_parser is not None:
        reasoning_format(config.reasoning_parser)
    if config.tool_call_parser is None:
        return
    if tool_format(config.tool_call_parser).name != ROW and config.tool_template == "generic":
        raise UsageError(
            f"--tool-template generic asks for calls of the format {ROW}, found --tool-call-parser "
            f"{config.tool_call_parser}",
            fix="leave --tool-call-parser out",
            param="tool_call_parser",
        )


VLLM_METHODS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("awq_marlin", "auto_awq", "cpu_awq"), ("awq",)),
    **dict.fromkeys(("gptq_marlin", "auto_gptq", "gptq_bitblas"), ("gptq",)),
    "moe_wna16": ("awq", "gptq"),
}
"""vLLM's names of kernels that read what a checkpoint's method is; every other name is a method's own."""


def check_quantization(asked: str | None, found: str) -> None:
    """Refuse ``--quantization`` of another method than the model has.

    Args:
        found: as ``EngineInfo`` has it, such as ``gptq 4-bit``.

    Raises:
        UsageError.
    """
    method = found.split()[0]
    if asked is None or method in VLLM_METHODS.get(asked.lower(), (asked.lower(),)):
        return
    dense = method == "none"
    raise UsageError(
        f"--quantization {asked}: the model's weights are {'not quantized' if dense else f'quantized by {method}'}",
        fix="llmctl quantize makes a quantized checkpoint; else leave it out"
        if dense
        else f"--quantization {method}, or leave it out",
        param="quantization",
    )
