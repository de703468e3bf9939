"""Settings of every subcommand as frozen dataclasses; the CLI's defaults and the YAML keys in configs/ come from here.

A field's name is the option's name with underscores; ``as_family`` is ``--as``, for Python has kept that word, and says
which family a checkpoint of an unknown one is read as. ``None`` on a numeric field means "auto": the code that
resolves it builds a new object. ``load_yaml_options`` reads ``--config`` files and refuses unknown keys.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmctl.errors import UsageError

GPU_MEMORY_UTILIZATION = 0.9
"""Share of a GPU's memory that an engine may take when none is given."""

QUANTIZED_BITS, QUANTIZED_GROUP = 4, 64
"""Bits and group size of quantized linears where neither the user nor the method says them."""


@dataclass(frozen=True)
class QuantizeConfig:
    """``llmctl quantize``: checkpoint -> quantized checkpoint.

    ``symmetric`` None: by method, as ``is_symmetric``; ``bits``, ``group_size`` None: by method, as its row in
    ``quantize.methods`` says. ``max_kl``, ``max_size``: what several are chosen among by. ``merge_adapter``: each
    ``DIR`` or ``DIR=WEIGHT``, merged before anything else. ``device``: torch's name of where layers are quantized.
    """

    model: str = ""
    output: str = ""
    method: str = "awq"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    format: str = "auto"
    calib: str = "self"
    calib_samples: int = 32
    calib_length: int = 128
    seed: int = 0
    damp_percent: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    sweeps: int = 2
    original_targets: float = 0.5
    rotate: bool = False
    ignore: tuple[str, ...] = ("lm_head",)
    override: tuple[str, ...] = ()
    target_bpw: float | None = None
    target_size: str | None = None
    max_kl: float | None = None
    max_size: str | None = None
    backend: str = "native"
    eval_text: str = "builtin"
    resume: bool = False
    threads: int | None = None
    device: str = "cpu"
    merge_adapter: tuple[str, ...] = ()
    as_family: str = ""

    @property
    def steps(self) -> list[str]:
        """What ``method`` does, in order."""
        return self.method.split("+")

    @property
    def aims_at_original(self) -> bool:
        """Whether the unquantized model's activations are needed beside the quantized one's."""
        return "gptq" in self.steps and self.original_targets > 0

    @property
    def is_symmetric(self) -> bool:
        """Whether zero points are fixed: as the user says, else by method.

        AWQ's are fitted, for its usual layout stores them; most readers of GPTQ's layout want them fixed.
        """
        return self.method != "awq" if self.symmetric is None else self.symmetric

    @property
    def has_budget(self) -> bool:
        """Whether the bits of each linear are to be chosen."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def has_limits(self) -> bool:
        """Whether it is said which of several quantizations to keep."""
        return self.max_kl is not None or self.max_size is not None or self.has_budget


@dataclass(frozen=True)
class ConvertConfig:
    """``llmctl convert``: quantized checkpoint -> the same numbers in another format."""

    model: str = ""
    to: str = ""
    output: str = ""
    as_family: str = ""


@dataclass(frozen=True)
class MergeConfig:
    """``llmctl merge``: checkpoint and adapters (each ``DIR`` or ``DIR=WEIGHT``) -> plain checkpoint."""

    base: str = ""
    adapters: tuple[str, ...] = ()
    output: str = ""
    dtype: str = "auto"
    as_family: str = ""


@dataclass(frozen=True)
class EvalConfig:
    """``llmctl eval``: how well a model predicts a text, and how far it is from another one.

    ``context`` None: 1024, or the model's longest. ``stride`` None: the context. ``windows``: so many spread over the
    text in place of a stride. The limits are gates; None: none.
    """

    model: str = ""
    against: str = ""
    text: str = "builtin"
    context: int | None = None
    stride: int | None = None
    windows: int | None = None
    max_tokens: int | None = None
    activations: str = "auto"
    max_kl: float | None = None
    max_delta_nll: float | None = None
    min_agreement: str | None = None
    as_family: str = ""


@dataclass(frozen=True)
class BuildConfig:
    """``llmctl build``: checkpoint -> engine folder."""

    model: str = ""
    output: str = ""
    target: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    activations: str = "auto"
    lm_head: str = "auto"
    eval_text: str = "builtin"
    passes: tuple[str, ...] | None = None
    dry_run: bool = False
    memory_budget: str | None = None
    as_family: str = ""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to be run; shared by ``serve`` and offline ``bench``.

    ``target`` "auto": an engine's own; for anything that is built first, this machine's best (``targets.table``).
    ``max_num_seqs``, ``max_num_batched_tokens`` None: the target's default. ``gpu_memory_utilization`` None:
    ``GPU_MEMORY_UTILIZATION``; told to have no effect where it has none. ``kv_cache_dtype`` "auto": as built.
    ``itl_target``: "auto" or milliseconds, see ``itl_target_seconds``. ``shed``: refuse what cannot keep its TTFT
    deadline, or missed it in the queue. ``max_cpu_loras`` None: ``max_loras``.
    """

    model: str = ""
    target: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_memory: str | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fair"
    max_num_queued_reqs: int = 1024
    itl_target: str = "auto"
    shed: bool = False
    threads: int | None = None
    seed: int = 0
    verify: bool = False
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    as_family: str = ""

    def sized(self, max_num_seqs: int, max_num_batched_tokens: int) -> EngineConfig:
        """These options with the size of a step settled."""
        kept = {field.name: getattr(self, field.name) for field in fields(EngineOptions)}
        sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        return EngineConfig(**{**kept, **sizes})


@dataclass(frozen=True)
class EngineConfig(EngineOptions):
    """``EngineOptions`` with the size of a step settled: what a scheduler is made of."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512


@dataclass(frozen=True)
class ServeConfig(EngineOptions):
    """``llmctl serve``: engine (or anything that can be built into one) -> OpenAI-compatible API."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    chat_template: str | None = None
    tool_call_parser: str | None = None
    enable_auto_tool_choice: bool = False
    tool_template: str = "model"
    reasoning_parser: str | None = None
    trust_request_chat_template: bool = False
    prefill_assistant: bool = True
    generation_config: str = "auto"
    pooling: str = "last"
    quantization: str | None = None
    lora_modules: tuple[str, ...] = ()
    lora_dir: str | None = None
    api_key: str | None = field(default=None, repr=False)
    priority_keys: str | None = field(default=None, repr=False)
    api_key_file: str | None = None
    deadline: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    max_body: str | None = None
    drain_timeout: float = 30.0
    stall_timeout: float = 60.0
    root_path: str = ""
    allowed_origins: str | None = None
    ui: bool = True
    sse_keepalive: float = 15.0
    max_restarts: int = 3
    metrics_prefix: str = "llmctl"
    log_level: str = "info"
    request_log: str | None = None
    request_log_text: bool = False
    otlp_traces_endpoint: str | None = None
    worker_nice: int | None = None
    worker_cpus: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """``llmctl run``: one answer, or a chat. How the engine runs is ``EngineOptions``'; None: the server's to choose.

    ``raw``: texts go to the model without its chat template. ``history``: typed lines are kept for the next chat.
    """

    model: str = ""
    system: str = ""
    raw: bool = False
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    history: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | None = None


_NAMED_OTHERWISE = {"as_family": "as"}


def option_of(name: str) -> str:
    """The option of a field: ``--max-num-seqs`` of ``max_num_seqs``."""
    return "--" + _NAMED_OTHERWISE.get(name, name).replace("_", "-")


def load_yaml_options(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Options from a YAML file. Keys are option names, with dashes or underscores.

    Raises:
        UsageError: unreadable file, not a mapping, or an unknown key (the nearest known one is named).
    """
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}", param="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid YAML: {_yaml_problem(error)}", param="config") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise UsageError(f"--config {path}: expected a mapping of options, found {type(loaded).__name__}")
    names = sorted(set(known))
    options: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UsageError(f"--config {path}: unknown option '{key}'{_nearest(name, names)}", param=str(key))
        options[name] = value
    return options


def override_text(mapping: Mapping[Any, Any]) -> str:
    """The text of an override that YAML has as a mapping: ``{match: "*.down_proj", bits: 8, group-size: 32}``.

    Raises:
        UsageError: no ``match``, or no setting beside it.
    """
    settings = {str(key).replace("_", "-"): value for key, value in mapping.items()}
    pattern = settings.pop("match", None)
    if not isinstance(pattern, str) or not settings:
        found = ", ".join(map(str, mapping)) or "nothing"
        raise UsageError(f"override: expected match with bits or group-size, found {found}", param="override")
    return f"{pattern}:" + ",".join(f"{key}={value}" for key, value in settings.items())


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, without the text there, which may be a key."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return type(error).__name__
    shown = re.sub("'[^']{2,}'", "[not shown]", problem)
    return f"{shown}, line {mark.line + 1}, column {mark.column + 1}"


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0].replace('_', '-')}'?"
    return "; known options: " + ", ".join(n.replace("_", "-") for n in names)


def itl_target_seconds(text: str) -> float | None:
    """Seconds of ``--itl-target``, which is milliseconds; 0: no target; None: "auto".

    Raises:
        UsageError: neither "auto" nor a number from 0 on.
    """
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"--itl-target: expected auto, 0 or milliseconds, found '{text}'", param="itl_target")
    return value / 1000


def parse_bytes(text: str, *, param: str) -> int:
    """Bytes in a size such as ``512MiB``, ``4GB``, ``1.5GiB`` or ``1000000``.

    Raises:
        UsageError: not a size, or not positive.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units[letter] = units[f"{letter}ib"] = 1024**power
        units[f"{letter}b"] = 1000**power
    stripped = text.strip().lower()
    digits = stripped.rstrip("bikmgt").strip()
    unit = stripped[len(digits) :].strip()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(
            f"--{param.replace('_', '-')}: expected a size such as 512MiB or 4GB, found '{text}'", param=param
        )
    return size
