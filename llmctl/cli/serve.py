"""``llmctl serve``: an engine, or anything that can be built into one, behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated

import typer

from llmctl.cli.common import ConfigOption, guarded
from llmctl.cli.vllm_flags import PANEL, with_vllm_flags
from llmctl.config import GPU_MEMORY_UTILIZATION, ServeConfig
from llmctl.errors import UsageError

_D = ServeConfig()
_MODEL, _SERVER, _ENGINE, _MEMORY, _SECURITY = "Model", "Server", "Engine", "Memory", "Security"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="An engine folder, a checkpoint folder, a .gguf file, demo:smollm2-135m, or a hub id; also without the "
        "--model.",
        rich_help_panel=_MODEL,
    ),
]
ServedName = Annotated[
    list[str],
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="Name in the API; the model's own by default. Several: requests may use any, answers have the first.",
        rich_help_panel=_MODEL,
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template", metavar="FILE", help="Jinja template instead of the model's own.", rich_help_panel=_MODEL
    ),
]
ToolCallParser = Annotated[
    str | None,
    typer.Option(
        "--tool-call-parser",
        metavar="NAME",
        help="How the model writes tool calls, by vLLM's names: hermes, llama3_json, pythonic, mistral, deepseek_v3, "
        "deepseek_v31, qwen3_coder, json and others; by default what the chat template's text shows, else json.",
        rich_help_panel=_MODEL,
    ),
]
AutoToolChoice = Annotated[
    bool,
    typer.Option(
        "--enable-auto-tool-choice",
        help="As vLLM's, and without effect: calls are found in every answer to a request with tools, unless its "
        "tool_choice is none.",
        rich_help_panel=_MODEL,
    ),
]
ToolTemplate = Annotated[
    str,
    typer.Option(
        "--tool-template",
        metavar="WHOSE",
        help="What shows a request's tools to the model. model: its chat template; generic: a built-in system message, "
        "for templates that know no tools.",
        rich_help_panel=_MODEL,
    ),
]
ReasoningParser = Annotated[
    str | None,
    typer.Option(
        "--reasoning-parser",
        metavar="NAME",
        help="How the model writes its reasoning, which then comes as reasoning_content: deepseek_r1, qwen3, mistral, "
        "granite and others; by default it is content.",
        rich_help_panel=_MODEL,
    ),
]
TrustRequestTemplate = Annotated[
    bool,
    typer.Option(
        "--trust-request-chat-template",
        help="Requests may bring a chat template of their own.",
        rich_help_panel=_MODEL,
    ),
]
GenerationConfig = Annotated[
    str,
    typer.Option(
        "--generation-config",
        metavar="SOURCE",
        help="Where sampling parameters of requests that bring none come from. auto: what the model recommends; vllm: "
        "none, OpenAI's defaults; else a generation_config.json, or a folder with one.",
        rich_help_panel=_MODEL,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        help="What a checkpoint is built for: cuda (this machine's GPU), cpu or reference; auto: the GPU where one can "
        "be used, else the CPU. An engine must be for it.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.", rich_help_panel=_MODEL)]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check every file of the engine against its sha256.", rich_help_panel=_MODEL)
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.", rich_help_panel=_SERVER)]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.", rich_help_panel=_SERVER)]
DrainTimeout = Annotated[
    float,
    typer.Option(
        "--drain-timeout",
        metavar="SECONDS",
        min=0,
        help="How long running requests may take to finish after SIGTERM.",
        rich_help_panel=_SERVER,
    ),
]
StallTimeout = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        metavar="SECONDS",
        min=0.1,
        help="Without a step for this long while requests run, or a sign of life while none do, /ready says stalled.",
        rich_help_panel=_SERVER,
    ),
]
RootPath = Annotated[
    str,
    typer.Option(
        "--root-path",
        metavar="PATH",
        help="What a proxy serves this server under, such as /llm; whether it strips it from requests or not.",
        rich_help_panel=_SERVER,
    ),
]
SseKeepalive = Annotated[
    float,
    typer.Option(
        "--sse-keepalive",
        metavar="SECONDS",
        min=0,
        help="How long a stream may wait for its first token in silence: then its status line is sent, and a comment, "
        "and another one every so often until the token comes; 0: in silence for ever.",
        rich_help_panel=_SERVER,
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts",
        metavar="N",
        min=0,
        help="How often within 10 minutes a dead worker is restarted before the server ends; 0: never.",
        rich_help_panel=_SERVER,
    ),
]
MaxBody = Annotated[
    str | None,
    typer.Option(
        "--max-body",
        metavar="SIZE",
        help="Largest request, such as 8MiB; by default 1 KiB a token of context, 1 to 32 MiB.",
        rich_help_panel=_SERVER,
    ),
]
MetricsPrefix = Annotated[
    str,
    typer.Option(
        "--metrics-prefix",
        metavar="NAME",
        help="What series of /metrics begin with; vllm: for dashboards and routers that know only vLLM's names.",
        rich_help_panel=_SERVER,
    ),
]
LogLevel = Annotated[
    str,
    typer.Option("--log-level", help="debug (with an access log), info, warning or error.", rich_help_panel=_SERVER),
]
RequestLog = Annotated[
    str | None,
    typer.Option(
        "--request-log",
        metavar="FILE",
        help="One JSON object for each finished or refused request, without texts; -: stdout. SIGHUP opens FILE again.",
        rich_help_panel=_SERVER,
    ),
]
RequestLogText = Annotated[
    bool,
    typer.Option("--request-log-text", help="Prompts and outputs in the request log, too.", rich_help_panel=_SERVER),
]
OtlpTraces = Annotated[
    str | None,
    typer.Option(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="Send a trace of each request to this OpenTelemetry collector, by OTLP over HTTP. Needs the extra otel.",
        rich_help_panel=_SERVER,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="LLMCTL_API_KEY",
        metavar="KEY",
        show_default=False,
        help="Required of every request but /health and /ready; several: comma-separated. Other users of the machine "
        "can see it on the command line: prefer the variable, or --api-key-file.",
        rich_help_panel=_SECURITY,
    ),
]
PriorityKeys = Annotated[
    str | None,
    typer.Option(
        "--priority-keys",
        envvar="LLMCTL_PRIORITY_KEYS",
        metavar="KEY",
        show_default=False,
        help="More keys, comma-separated: with several keys in all, only requests with one of these may set priority "
        "or deadline.",
        rich_help_panel=_SECURITY,
    ),
]
ApiKeyFile = Annotated[
    str | None,
    typer.Option(
        "--api-key-file",
        envvar="LLMCTL_API_KEY_FILE",
        metavar="FILE",
        help="More keys, hashed: lines of NAME sha256:HEX, then the word priority if the key may set priority or "
        "deadline. Read again on SIGHUP.",
        rich_help_panel=_SECURITY,
    ),
]
AllowedOrigins = Annotated[
    str | None,
    typer.Option(
        "--allowed-origins",
        metavar="ORIGINS",
        help="Origins whose pages may use this server from a browser (CORS): comma-separated, a JSON list, or *. None "
        "by default.",
        rich_help_panel=_SECURITY,
    ),
]
SslKey = Annotated[
    str | None, typer.Option("--ssl-keyfile", metavar="FILE", help="TLS private key.", rich_help_panel=_SECURITY)
]
SslCert = Annotated[
    str | None, typer.Option("--ssl-certfile", metavar="FILE", help="TLS certificate.", rich_help_panel=_SECURITY)
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len", metavar="TOKENS", min=1, help="Longest prompt and output.", rich_help_panel=_MEMORY
    ),
]
KvCacheMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-memory",
        metavar="SIZE",
        help="KV cache, such as 2GiB; by default what all requests could use: at most what the budget of a GPU leaves, "
        "or 4 GiB of the host's memory.",
        rich_help_panel=_MEMORY,
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="What the KV cache is made of: auto (as the engine was built), int8; fp8 on a GPU; or a float dtype of "
        "the target.",
        rich_help_panel=_MEMORY,
    ),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        metavar="SHARE",
        help=f"Share of the GPU's memory to take in all, above 0 and up to 1; {GPU_MEMORY_UTILIZATION:g} by default. "
        "What other processes hold now is taken off. Only for a GPU.",
        rich_help_panel=_MEMORY,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", metavar="TOKENS", min=1, help="Tokens a KV-cache block.", rich_help_panel=_MEMORY),
]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Reuse the KV cache of equal prompt beginnings.",
        rich_help_panel=_MEMORY,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs",
        min=1,
        help="Requests running at once; by default 256 on a GPU, 64 on a CPU.",
        rich_help_panel=_ENGINE,
    ),
]
MaxBatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        min=1,
        help="Tokens computed a step; by default 2048 on a GPU, 512 on a CPU.",
        rich_help_panel=_ENGINE,
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="Launch every kernel of a step by itself instead of replaying recorded CUDA graphs. Only for a GPU.",
        rich_help_panel=_ENGINE,
    ),
]
ChunkedPrefill = Annotated[
    bool,
    typer.Option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        help="Compute long prompts over several steps.",
        rich_help_panel=_ENGINE,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        "--scheduling-policy",
        metavar="POLICY",
        help="Which waiting request is next. fcfs: the oldest. priority: that with the lowest priority, for which "
        "running ones with larger values make room; within one value the first due, without deadlines the oldest. "
        "fair: the same, and within one value tenants take turns by tokens served; a tenant is an API key if there are "
        "several, else the request's 'user', else the client's address.",
        rich_help_panel=_ENGINE,
    ),
]
ItlTarget = Annotated[
    str,
    typer.Option(
        "--itl-target",
        metavar="MS",
        help="How long a step may take in which prompts are computed beside requests that wait for their next token: "
        "prompts are cut to fit, by what steps have cost so far. auto: 4.6 times a step without prompts, short ones "
        "that wait counted as running; 0: no limit.",
        rich_help_panel=_ENGINE,
    ),
]
DeadlineOption = Annotated[
    str | None,
    typer.Option(
        "--deadline",
        metavar="DEADLINE",
        help="Such as ttft:300,itl:50: milliseconds to a first token, and between those after it in the mean; either "
        "may be left out, and a request may bring its own. What is due first is next; prompts and waiting requests are "
        "held back where they would cost running ones their itl. Not with fcfs.",
        rich_help_panel=_ENGINE,
    ),
]
Shed = Annotated[
    bool,
    typer.Option(
        "--shed",
        help="Answer 429 to a request with a deadline (its own, or --deadline) whose first token is expected after it, "
        "or that missed it in the queue.",
        rich_help_panel=_ENGINE,
    ),
]
MaxQueued = Annotated[
    int,
    typer.Option(
        "--max-num-queued-reqs", min=1, help="Requests waiting beyond which new ones get 429.", rich_help_panel=_ENGINE
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads of the model; by default one for each physical core that the process may run on. Fewer where "
        "others use the cores: each step waits for the slowest. Not for a GPU.",
        rich_help_panel=_ENGINE,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of requests that bring none.", rich_help_panel=_ENGINE)]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        "-q",
        metavar="METHOD",
        help="What the model is quantized by, such as awq or gptq: checked against it, nothing is quantized here.",
        rich_help_panel=PANEL,
    ),
]


@guarded
@with_vllm_flags
def serve(
    ctx: typer.Context,
    model: Model = _D.model,
    served_model_name: ServedName = list(_D.served_model_name),  # noqa: B006
    chat_template: ChatTemplate = _D.chat_template,
    tool_call_parser: ToolCallParser = _D.tool_call_parser,
    enable_auto_tool_choice: AutoToolChoice = _D.enable_auto_tool_choice,
    tool_template: ToolTemplate = _D.tool_template,
    reasoning_parser: ReasoningParser = _D.reasoning_parser,
    trust_request_chat_template: TrustRequestTemplate = _D.trust_request_chat_template,
    generation_config: GenerationConfig = _D.generation_config,
    target: Target = _D.target,
    dtype: Dtype = _D.dtype,
    verify: Verify = _D.verify,
    host: Host = _D.host,
    port: Port = _D.port,
    max_body: MaxBody = _D.max_body,
    drain_timeout: DrainTimeout = _D.drain_timeout,
    stall_timeout: StallTimeout = _D.stall_timeout,
    root_path: RootPath = _D.root_path,
    sse_keepalive: SseKeepalive = _D.sse_keepalive,
    max_restarts: MaxRestarts = _D.max_restarts,
    metrics_prefix: MetricsPrefix = _D.metrics_prefix,
    log_level: LogLevel = _D.log_level,
    request_log: RequestLog = _D.request_log,
    request_log_text: RequestLogText = _D.request_log_text,
    otlp_traces_endpoint: OtlpTraces = _D.otlp_traces_endpoint,
    api_key: ApiKey = _D.api_key,
    priority_keys: PriorityKeys = _D.priority_keys,
    api_key_file: ApiKeyFile = _D.api_key_file,
    allowed_origins: AllowedOrigins = _D.allowed_origins,
    ssl_keyfile: SslKey = _D.ssl_keyfile,
    ssl_certfile: SslCert = _D.ssl_certfile,
    max_model_len: MaxModelLen = _D.max_model_len,
    kv_cache_dtype: KvCacheDtype = _D.kv_cache_dtype,
    kv_cache_memory: KvCacheMemory = _D.kv_cache_memory,
    gpu_memory_utilization: GpuMemoryUtilization = _D.gpu_memory_utilization,
    block_size: BlockSize = _D.block_size,
    enable_prefix_caching: PrefixCaching = _D.enable_prefix_caching,
    max_num_seqs: MaxNumSeqs = _D.max_num_seqs,
    max_num_batched_tokens: MaxBatchedTokens = _D.max_num_batched_tokens,
    enforce_eager: EnforceEager = _D.enforce_eager,
    enable_chunked_prefill: ChunkedPrefill = _D.enable_chunked_prefill,
    scheduling_policy: Policy = _D.scheduling_policy,
    max_num_queued_reqs: MaxQueued = _D.max_num_queued_reqs,
    itl_target: ItlTarget = _D.itl_target,
    deadline: DeadlineOption = _D.deadline,
    shed: Shed = _D.shed,
    threads: Threads = _D.threads,
    seed: Seed = _D.seed,
    quantization: Quantization = _D.quantization,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Serve a model behind an OpenAI-compatible API.

    What is not an engine yet is built into the cache first. SIGTERM drains; a second one stops at once.

    Example: [bold]llmctl serve --model ./engine --port 8000[/bold]
    """
    if ctx.args:  # not shown: after a comma too many it is a key
        raise UsageError(
            "unexpected extra argument",
            fix="one MODEL; several names are --served-model-name A --served-model-name B",
        )
    settings = ServeConfig(
        model=model,
        quantization=quantization,
        target=target,
        dtype=dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        scheduling_policy=scheduling_policy,
        max_num_queued_reqs=max_num_queued_reqs,
        itl_target=itl_target,
        deadline=deadline,
        shed=shed,
        threads=threads,
        seed=seed,
        verify=verify,
        host=host,
        port=port,
        served_model_name=tuple(served_model_name),
        chat_template=chat_template,
        tool_call_parser=tool_call_parser,
        enable_auto_tool_choice=enable_auto_tool_choice,
        tool_template=tool_template,
        reasoning_parser=reasoning_parser,
        trust_request_chat_template=trust_request_chat_template,
        generation_config=generation_config,
        api_key=api_key,
        priority_keys=priority_keys,
        api_key_file=api_key_file,
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        max_body=max_body,
        drain_timeout=drain_timeout,
        stall_timeout=stall_timeout,
        root_path=root_path,
        sse_keepalive=sse_keepalive,
        allowed_origins=allowed_origins,
        max_restarts=max_restarts,
        metrics_prefix=metrics_prefix,
        log_level=log_level,
        request_log=request_log,
        request_log_text=request_log_text,
        otlp_traces_endpoint=otlp_traces_endpoint,
    )
    from llmctl.serving.launch import run_server

    run_server(settings)
