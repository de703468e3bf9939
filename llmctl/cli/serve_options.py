"""The options of ``llmctl serve``: names, help, panels. A field of ``ServeConfig`` each, which has the default."""

from __future__ import annotations

from typing import Annotated

import typer

from llmctl.cli.vllm_flags import PANEL
from llmctl.config import GPU_MEMORY_UTILIZATION

_MODEL, _SERVER, _ENGINE, _MEMORY, _SECURITY = "Model", "Server", "Engine", "Memory", "Security"
_ADAPTERS = "Adapters"

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
PrefillAssistant = Annotated[
    bool,
    typer.Option(
        "--prefill-assistant/--no-prefill-assistant",
        help="The answer to a chat whose last message is the assistant's goes on with it, unless the request has "
        "continue_final_message or add_generation_prompt; without, a new message is asked for.",
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
Pooling = Annotated[
    str,
    typer.Option(
        "--pooling",
        metavar="WHOSE",
        help="Whose hidden states make an embedding, of requests that do not say. last: the last token's; mean: the "
        "mean of all.",
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
WorkerNice = Annotated[
    int | None,
    typer.Option(
        "--worker-nice",
        min=0,
        max=19,
        help="How much nicer (nice(2)) the worker is than what answers clients; default: 5 where it computes on CPUs.",
        rich_help_panel=_SERVER,
    ),
]
WorkerCpus = Annotated[
    str | None,
    typer.Option(
        "--worker-cpus",
        metavar="LIST",
        help="Processors that the worker is kept to, such as 0-3,8; it has no more threads than these. Linux.",
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
Ui = Annotated[
    bool,
    typer.Option(
        "--ui/--no-ui",
        help="The page at / (chat, live view, engine) and the description at /docs. Without them only the API answers.",
        rich_help_panel=_SERVER,
    ),
]
SseKeepalive = Annotated[
    float,
    typer.Option(
        "--sse-keepalive",
        metavar="SECONDS",
        min=0,
        help="How often a stream that waits for its first token is sent a comment, the first with its status line: as "
        "soon as it is sure not to be refused, or after this time; 0: nothing before its first token.",
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
        "prompts are cut to fit, by what steps have cost so far. auto: 4.9 times a step without prompts, short ones "
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
EnableLora = Annotated[
    bool, typer.Option("--enable-lora", help="Serve LoRA adapters beside the model.", rich_help_panel=_ADAPTERS)
]
LoraModules = Annotated[
    list[str],
    typer.Option(
        "--lora-modules",
        metavar="NAME=PATH",
        help="PEFT folders, each a model of its own name in the API; more of them may follow, or the option again.",
        rich_help_panel=_ADAPTERS,
    ),
]
MaxLoras = Annotated[
    int,
    typer.Option("--max-loras", min=1, help="Adapters that requests run with at once.", rich_help_panel=_ADAPTERS),
]
MaxLoraRank = Annotated[
    int, typer.Option("--max-lora-rank", min=1, help="Largest rank of an adapter.", rich_help_panel=_ADAPTERS)
]
MaxCpuLoras = Annotated[
    int | None,
    typer.Option(
        "--max-cpu-loras",
        min=1,
        help="Adapters kept in the host's memory; others are read again when a request comes. By default --max-loras.",
        rich_help_panel=_ADAPTERS,
    ),
]
LoraDir = Annotated[
    str | None,
    typer.Option(
        "--lora-dir",
        metavar="DIR",
        help="Allow POST /v1/load_lora_adapter and /v1/unload_lora_adapter, for folders below this one; relative paths "
        "are taken from it.",
        rich_help_panel=_ADAPTERS,
    ),
]
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
