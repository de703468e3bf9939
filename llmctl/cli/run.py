"""``llmctl run``: one answer on stdout, or a chat, with a model of this machine or any OpenAI-compatible server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.cli import serve_options as o
from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, is_given, on_command_line, print_json
from llmctl.config import RunConfig, ServeConfig, option_of
from llmctl.errors import LlmctlError, UsageError

if TYPE_CHECKING:
    from llmctl.bench.endpoint import Endpoint
    from llmctl.bench.local_server import ServerError
    from llmctl.bench.readiness import ServerFacts
    from llmctl.cli.chat.conversation import Conversation

_D, _R = ServeConfig(), RunConfig()
_ANSWER, _SERVER = "Answer", "Another server"
_ENGINE = (
    "target", "dtype", "verify", "chat_template", "reasoning_parser", "generation_config", "max_model_len",
    "kv_cache_dtype", "kv_cache_memory", "gpu_memory_utilization", "enforce_eager", "threads",
)  # fmt: skip
"""The options of ``serve`` that ``run`` has too: those of a server that it starts itself."""
_ONE_AT_A_TIME = ("--max-num-seqs", "1", "--log-level", "warning", "--no-ui")

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [PROMPT]",
        help="An engine folder, a checkpoint folder, a .gguf file, demo:smollm2-135m, or a hub id; then the question. "
        "Without one: what is piped in, or a chat.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="Likewise; then all words are the prompt.", rich_help_panel="Model"
    ),
]
System = Annotated[str, typer.Option("--system", metavar="TEXT", help="System prompt.", rich_help_panel=_ANSWER)]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw",
        help="Give the model the text as it is, without its chat template: for models that only continue texts.",
        rich_help_panel=_ANSWER,
    ),
]


def _answer(name: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel=_ANSWER)


Temperature = Annotated[
    float | None, _answer("--temperature", "0 is greedy; by default what the model recommends, as all below.")
]
TopP = Annotated[float | None, _answer("--top-p", "Share of probability that is sampled from.")]
TopK = Annotated[int | None, _answer("--top-k", "Tokens that are sampled from.")]
MinP = Annotated[float | None, _answer("--min-p", "Least probability, as a share of the most likely token's.")]
RepetitionPenalty = Annotated[float | None, _answer("--repetition-penalty", "Above 1: against tokens that were there.")]
MaxTokens = Annotated[int | None, _answer("--max-tokens", "Longest answer.", "TOKENS")]
Seed = Annotated[int | None, _answer("--seed", "The same answer each time.")]
Stop = Annotated[str | None, _answer("--stop", "End the answer before this.", "TEXT")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        metavar="URL",
        help="Ask this server; MODEL is then one of its names. A single word or text that is none of them is the "
        "prompt, of its first model.",
        rich_help_panel=_SERVER,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="OPENAI_API_KEY",
        metavar="KEY",
        show_default=False,
        help="Sent as bearer token with --base-url.",
        rich_help_panel=_SERVER,
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Do not check TLS certificates.", rich_help_panel=_SERVER)]
History = Annotated[
    bool,
    typer.Option("--history/--no-history", help="Keep typed lines for the next chat, in a file that only you read."),
]


@guarded
def run(
    ctx: typer.Context,
    words: Words = None,
    model: Model = _R.model,
    system: System = _R.system,
    raw: Raw = _R.raw,
    temperature: Temperature = _R.temperature,
    top_p: TopP = _R.top_p,
    top_k: TopK = _R.top_k,
    min_p: MinP = _R.min_p,
    repetition_penalty: RepetitionPenalty = _R.repetition_penalty,
    max_tokens: MaxTokens = _R.max_tokens,
    seed: Seed = _R.seed,
    stop: Stop = _R.stop,
    base_url: BaseUrl = _R.base_url,
    api_key: ApiKey = _R.api_key,
    insecure: Insecure = _R.insecure,
    as_family: AsOption = _D.as_family,
    target: o.Target = _D.target,
    dtype: o.Dtype = _D.dtype,
    verify: o.Verify = _D.verify,
    chat_template: o.ChatTemplate = _D.chat_template,
    reasoning_parser: o.ReasoningParser = _D.reasoning_parser,
    generation_config: o.GenerationConfig = _D.generation_config,
    max_model_len: o.MaxModelLen = _D.max_model_len,
    kv_cache_dtype: o.KvCacheDtype = _D.kv_cache_dtype,
    kv_cache_memory: o.KvCacheMemory = _D.kv_cache_memory,
    gpu_memory_utilization: o.GpuMemoryUtilization = _D.gpu_memory_utilization,
    enforce_eager: o.EnforceEager = _D.enforce_eager,
    threads: o.Threads = _D.threads,
    history: History = _R.history,
    config: ConfigOption = None,  # noqa: ARG001
    json_output: JsonOption = False,
) -> None:
    """Ask a model, or chat with it; what is not an engine yet is built into the cache first. Also llmctl chat.

    Answers go to stdout, everything else to stderr. In a chat, /help lists what can be typed.

    Example: [bold]llmctl run demo:smollm2-135m "Why is the sky blue?"[/bold]

    Example: [bold]git diff | llmctl run ./engine "Summarize this change."[/bold]
    """
    words = list(words or ())
    typed = bool(words) and not on_command_line(ctx, "model")
    if typed:
        model = words.pop(0)
    settings = RunConfig(
        model=model,
        system=system,
        raw=raw,
        base_url=base_url,
        api_key=api_key,
        insecure=insecure,
        history=history,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop,
    )
    _check(settings, [name for name in ("as_family", *_ENGINE, "api_key") if is_given(ctx, name, environment=False)])
    there = _server_there(settings) if base_url is not None else None
    untold = None
    if there is not None and typed and not words:
        server = there[1]
        if server.lacks(model):
            if len(model.split()) == 1:  # it may have been meant as one
                from llmctl.cli.chat.terminal import say

                say(f"'{model}' is none of the server's models: taken as a prompt, for '{server.models[0]}'")
            settings, words = replace(settings, model=""), [model]
        untold = server.untold
    prompt = _prompt(words, untold)
    if json_output and prompt is None:
        raise UsageError("--json: is of one answer", fix='llmctl run MODEL "PROMPT" --json', param="json_output")
    serving = ServeConfig(
        model=model,
        as_family=as_family,
        target=target,
        dtype=dtype,
        verify=verify,
        chat_template=chat_template,
        reasoning_parser=reasoning_parser,
        generation_config=generation_config,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        threads=threads,
    )
    from llmctl.cli.chat.answers import AnswerStream
    from llmctl.cli.chat.repl import ask, converse
    from llmctl.cli.chat.terminal import say

    with _server(settings, serving, there) as (endpoint, name), AnswerStream(endpoint) as stream:
        chat = _conversation(settings, name)
        if prompt is None:
            say(f"{name}: /help lists what can be typed, /bye leaves")
            converse(stream, chat, keep_history=history)
            return
        answer = ask(stream, chat, prompt, show=not json_output)
        if json_output:
            print_json({"model": name, **answer.document()})


def _check(settings: RunConfig, given: list[str]) -> None:
    """Refuse, before anything is started, options that nothing could come of.

    Args:
        given: those that are of an engine of this machine, or of another server, and were typed or stand in the file.

    Raises:
        UsageError.
    """
    if settings.raw and settings.system:
        raise UsageError("--system: with --raw texts go to the model as they are", fix="put it into the text")
    if settings.raw and "chat_template" in given:
        raise UsageError("--chat-template: with --raw texts go to the model as they are", fix="leave one of them out")
    of_engine = [name for name in given if name != "api_key"]
    if settings.base_url is None:
        if not settings.model:
            raise UsageError("no model named", fix="llmctl run demo:smollm2-135m", param="model")
        if settings.insecure:
            raise UsageError("--insecure: is of --base-url", fix="leave it out", param="insecure")
        if "api_key" in given:
            raise UsageError("--api-key: is of --base-url", fix="leave it out", param="api_key")
    elif of_engine:
        option = option_of(of_engine[0])
        raise UsageError(
            f"{option}: is of an engine of this machine, and --base-url names a server",
            fix=f"leave {option} out, or give it to the server",
            param=of_engine[0],
        )


def _prompt(words: list[str], untold: str | None) -> str | None:
    """The question: the words, and below them what is piped in; None: there is none, and a chat is wanted.

    Args:
        untold: why it is not known whether the text taken for the model's name is one.

    Raises:
        UsageError: an empty one, or not UTF-8 text. LlmctlError: none, unless that text is it.
    """
    from llmctl.cli.chat.terminal import piped_text

    piped = piped_text(awaited=not words)
    if piped is None and not words:
        return None
    text = "\n\n".join(part for part in (" ".join(words), (piped or "").strip()) if part)
    if not text and untold is not None:
        raise LlmctlError(
            f"{untold}; so a single text may be a model or the prompt",
            fix='--api-key KEY where one is wanted, the URL of a server, or MODEL before "PROMPT"',
        )
    if not text:
        raise UsageError("the prompt is empty", fix='llmctl run MODEL "PROMPT", or a terminal for a chat')
    try:
        text.encode()
    except UnicodeEncodeError:  # a byte of the command line that Python kept as a surrogate
        raise UsageError("the prompt is not UTF-8 text", fix="convert it") from None
    return text


def _conversation(settings: RunConfig, name: str) -> Conversation:
    from llmctl.cli.chat.conversation import SAMPLING_FIELDS, Conversation

    given = {field: getattr(settings, field, None) for field in SAMPLING_FIELDS}
    sampling = {field: value for field, value in given.items() if value is not None}
    return Conversation(name, settings.raw, settings.system, sampling)


@contextmanager
def _server(
    settings: RunConfig, serving: ServeConfig, there: tuple[Endpoint, ServerFacts] | None
) -> Iterator[tuple[Endpoint, str]]:
    """The server to ask and the model's name there: one that runs, or our own for as long as this lasts.

    Raises:
        UsageError: the one that runs has no such model.
    """
    if there is None:
        with _own_server(serving) as found:
            yield found
        return
    from llmctl.bench.readiness import choose_model

    endpoint, server = there
    yield endpoint, choose_model(settings.model, server, endpoint.base_url)


def _server_there(settings: RunConfig) -> tuple[Endpoint, ServerFacts]:
    """``--base-url``, and what the server there says of itself.

    Raises:
        LlmctlError: nothing answers there. UsageError: no URL.
    """
    from llmctl.bench.endpoint import make_endpoint
    from llmctl.bench.readiness import Patience, await_server
    from llmctl.cli.chat.terminal import say

    assert settings.base_url is not None
    endpoint = make_endpoint(settings.base_url, None, "openai-chat", settings.api_key, (), not settings.insecure)
    try:
        return endpoint, await_server(endpoint, Patience(endpoint.base_url, 0.0, say))
    except LlmctlError as error:
        raise LlmctlError(error.message, fix="start it, or correct --base-url", param="base_url") from error


@contextmanager
def _own_server(serving: ServeConfig) -> Iterator[tuple[Endpoint, str]]:
    """``llmctl serve`` of the model, for this process alone: a key keeps others of this machine out.

    The engine is built here, where its progress is seen.
    """
    import secrets

    from llmctl.artifact.builder import ensure_engine
    from llmctl.bench.endpoint import make_endpoint
    from llmctl.bench.local_server import ServerError, option_words, running, serve_command
    from llmctl.cli.chat.terminal import say
    from llmctl.serving.config_check import check_config
    from llmctl.serving.model_names import default_model_name

    check_config(serving)
    engine = ensure_engine(serving.model, serving)
    name, key = default_model_name(str(engine)), secrets.token_urlsafe()
    options = [word for field in _ENGINE for word in option_words(field, getattr(serving, field))]
    command = serve_command(str(engine), [*options, *_ONE_AT_A_TIME])
    try:
        # However long it loads: who waits at the terminal sees that it does, and has Ctrl-C.
        with running(command, ready_timeout=math.inf, environment={"LLMCTL_API_KEY": key}, tell=say) as server:
            yield make_endpoint(server.url, None, "openai-chat", key, (), True), name
    except ServerError as error:
        raise _as_the_server_said(error) from error


def _as_the_server_said(error: ServerError) -> LlmctlError:
    """The error that the server's last line is, if it is one."""
    line = error.log.rpartition("\n")[2].strip()
    if not line.startswith("error: "):
        return error
    message, _, fix = line.removeprefix("error: ").partition(" (fix: ")
    said = LlmctlError(message, fix=fix.removesuffix(")") or None)
    said.exit_code = error.exit_code
    return said
