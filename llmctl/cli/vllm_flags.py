"""vLLM's flags that have no like here, as data: what becomes of each, and the options of ``serve`` made of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from llmctl.cli.model_word import takes_word
from llmctl.errors import UsageError

PANEL = "vLLM's flags"


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        names: as on the command line. metavar: of its value; None: a switch.
        words: why it has no effect; or why it is refused, and what to do instead.
        same: values that ask for what is done anyway, and are accepted without a word; None: it is never refused.
    """

    names: tuple[str, ...]
    metavar: str | None
    words: str
    same: tuple[str, ...] | None = None

    @property
    def parameter(self) -> str:
        """Its Python name."""
        return "vllm_" + self.names[0].lstrip("-").replace("-", "_")

    @property
    def help(self) -> str:
        """Its line of the help."""
        if self.same is None:
            return f"No effect: {self.words}."
        only = f"Only {' or '.join(self.same)}" if self.same else "Refused"
        return f"{only}: {self.words}."


_ONE = "an engine runs on one device"
_LOCAL = "main is loaded; hf download MODEL --revision R --local-dir DIR, then serve DIR"
_METHODS = ('["*"]', '["GET", "HEAD", "POST"]')

FLAGS = (
    Flag(("--tensor-parallel-size", "-tp"), "N", _ONE, ("1",)),
    Flag(("--pipeline-parallel-size", "-pp"), "N", _ONE, ("1",)),
    Flag(("--api-server-count", "-asc"), "N", "one process answers; start servers side by side, and a proxy", ("1",)),
    Flag(("--data-parallel-size", "-dp"), "N", "start a server for each device, and a proxy before them", ("1",)),
    Flag(("--trust-remote-code",), None, "no code of a checkpoint is ever run; families are built in", ()),
    Flag(("--tokenizer",), "MODEL", "the model's own; put other tokenizer files into a copy of the model", ("MODEL",)),
    Flag(("--tokenizer-mode",), "MODE", "tokenizer.json is read by the tokenizers library", ("auto", "hf")),
    Flag(("--load-format",), "FORMAT", "weights are read as they are found", ("auto", "safetensors")),
    Flag(("--revision",), "R", _LOCAL, ("main",)),
    Flag(("--tokenizer-revision",), "R", _LOCAL, ("main",)),
    Flag(("--download-dir",), "DIR", "set HF_HUB_CACHE=DIR in the environment", ()),
    Flag(("--hf-overrides",), "JSON", "config.json is read as it is; edit a copy, or use --max-model-len", ("{}",)),
    Flag(("--cpu-offload-gb",), "N", "weights are on one device; quantize them, or --target cpu", ("0",)),
    Flag(("--runner",), "KIND", "any model generates and embeds", ("auto", "generate", "pooling")),
    Flag(("--task",), "TASK", "any model generates and embeds, nothing else", ("auto", "generate", "embed")),
    Flag(("--convert",), "KIND", "any model embeds, as it is", ("auto", "none", "embed")),
    Flag(("--pooler-config",), "JSON", "use --pooling last or mean; normalize and dimensions are a request's", ()),
    Flag(("--enable-log-requests",), None, "use --request-log FILE; --request-log-text logs texts", ()),
    Flag(("--no-enable-log-requests",), None, "requests are logged by --request-log alone"),
    Flag(("--disable-log-requests",), None, "requests are logged by --request-log alone"),
    Flag(("--max-log-len",), "N", "texts are logged by --request-log-text alone, and whole"),
    Flag(("--disable-log-stats",), None, "--log-level warning leaves the status line out"),
    Flag(("--uvicorn-log-level",), "LEVEL", "--log-level is the whole server's"),
    Flag(("--swap-space",), "GIB", "what is preempted is computed again, not swapped"),
    Flag(("--max-seq-len-to-capture",), "N", "recorded steps serve every length of context"),
    Flag(("--disable-custom-all-reduce",), None, _ONE),
    Flag(("--fully-sharded-loras",), None, _ONE),
    Flag(("--lora-dtype",), "DTYPE", "adapters are kept as their linears read them", ("auto",)),
    Flag(("--lora-extra-vocab-size",), "N", "adapters add no tokens", ("0",)),
    Flag(("--distributed-executor-backend",), "NAME", _ONE),
    Flag(("--async-scheduling",), None, "steps overlap where the target can run ahead"),
    Flag(("--compilation-config", "-O"), "CONFIG", "kernels are compiled by llmctl build"),
    Flag(("--num-gpu-blocks-override",), "N", "the memory says how many there are; --kv-cache-memory SIZE sets it", ()),
    Flag(("--speculative-config",), "JSON", "no tokens are drafted", ()),
    Flag(("--guided-decoding-backend",), "NAME", "grammars are llguidance's, whichever is named"),
    Flag(
        ("--structured-outputs-config",),
        "JSON",
        "grammars are llguidance's; --reasoning-parser is an option of its own",
        ("{}", '{"backend": "auto"}', '{"backend": "guidance"}'),
    ),
    Flag(("--enable-reasoning",), None, "--reasoning-parser alone finds reasoning"),
    Flag(("--chat-template-content-format",), "FORMAT", "templates get texts", ("auto", "string")),
    Flag(("--response-role",), "ROLE", "answers are the assistant's", ("assistant",)),
    Flag(
        ("--override-generation-config",),
        "JSON",
        "values are read from a file; write these into one for --generation-config FILE",
        ("{}",),
    ),
    Flag(("--max-logprobs",), "N", "a token has at most 20 log-probabilities", ("20",)),
    Flag(("--return-tokens-as-token-ids",), None, "requests ask for it: return_tokens_as_token_ids", ()),
    Flag(("--limit-mm-per-prompt",), "JSON", "prompts are texts alone"),
    Flag(("--allow-credentials",), None, "keys are in headers, not in cookies", ()),
    Flag(("--allowed-methods",), "JSON", "pages of --allowed-origins may GET, HEAD and POST", _METHODS),
    Flag(("--allowed-headers",), "JSON", "pages of --allowed-origins may send any header", ('["*"]',)),
    Flag(("--disable-uvicorn-access-log",), None, "only --log-level debug has an access log"),
    Flag(("--disable-frontend-multiprocessing",), None, "the engine is always a process of its own"),
    Flag(("--enable-request-id-headers",), None, "every answer has its X-Request-Id"),
    Flag(("--enable-tokenizer-info-endpoint",), None, "GET /tokenizer_info is there without"),
)


def settled(flags: Mapping[Flag, str | bool | None], model: str) -> Iterator[str]:
    """A line for each of the given flags that has no effect.

    Raises:
        UsageError: one that cannot be honoured.
    """
    for flag, value in flags.items():
        if value is None or value is False:
            continue
        name = flag.names[0]
        if flag.same is None:
            yield f"{name} has no effect: {flag.words}"
        elif _plain(flag, value) not in flag.same and not ("MODEL" in flag.same and value == model):
            shown = name if value is True else f"{name} {value}"
            fix = f"leave it out{_instead(flag)}"
            raise UsageError(f"{shown}: not supported: {flag.words}", fix=fix, param=name[2:].replace("-", "_"))


def _plain(flag: Flag, value: str | bool) -> str | bool:
    """A value; of a JSON text, as ``same`` is written, whatever its blanks."""
    if flag.metavar != "JSON":
        return value
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(json.loads(str(value)))
    return value


def _instead(flag: Flag) -> str:
    return f", or {flag.names[0]} {shlex.quote(flag.same[0])}" if flag.same else ""


def with_vllm_flags(function: Callable[..., None]) -> Callable[..., None]:
    """A command with these flags beside its own options, settled before it runs.

    It has ``model`` and ``ctx`` among its parameters, and words that are left over in ``ctx.args``: the first is the
    model where ``--model`` was not given, whatever a YAML file says.
    """
    hints = get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def command(**values: Any) -> None:
        flags = {flag: values.pop(flag.parameter) for flag in FLAGS}
        words = values["ctx"].args
        if words and takes_word(values["ctx"], words[0], values["model"]):
            values["model"] = words.pop(0)
        for line in settled(flags, values["model"]):
            print(line, file=sys.stderr)
        function(**values)

    del command.__wrapped__
    own = inspect.signature(function).parameters.values()
    parameters = [each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    made = [_parameter(flag) for flag in FLAGS]
    command.__signature__ = inspect.Signature([*parameters, *made])  # type: ignore[attr-defined]
    command.__annotations__ = {**hints, **{parameter.name: parameter.annotation for parameter in made}}
    return command


def _parameter(flag: Flag) -> inspect.Parameter:
    kind: Any = bool if flag.metavar is None else str | None
    option = typer.Option(*flag.names, metavar=flag.metavar, help=flag.help, rich_help_panel=PANEL)
    default = False if flag.metavar is None else None
    return inspect.Parameter(
        flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
