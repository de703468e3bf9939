"""``llmctl serve``: an engine, or anything that can be built into one, behind an OpenAI-compatible API."""

from __future__ import annotations

import typer

from llmctl.cli import serve_options as o
from llmctl.cli.common import AsOption, ConfigOption, guarded
from llmctl.cli.vllm_flags import with_vllm_flags
from llmctl.config import ServeConfig
from llmctl.errors import UsageError

_D = ServeConfig()


@guarded
@with_vllm_flags
def serve(
    ctx: typer.Context,
    model: o.Model = _D.model,
    as_family: AsOption = _D.as_family,
    served_model_name: o.ServedName = list(_D.served_model_name),  # noqa: B006
    chat_template: o.ChatTemplate = _D.chat_template,
    tool_call_parser: o.ToolCallParser = _D.tool_call_parser,
    enable_auto_tool_choice: o.AutoToolChoice = _D.enable_auto_tool_choice,
    tool_template: o.ToolTemplate = _D.tool_template,
    reasoning_parser: o.ReasoningParser = _D.reasoning_parser,
    trust_request_chat_template: o.TrustRequestTemplate = _D.trust_request_chat_template,
    prefill_assistant: o.PrefillAssistant = _D.prefill_assistant,
    generation_config: o.GenerationConfig = _D.generation_config,
    pooling: o.Pooling = _D.pooling,
    target: o.Target = _D.target,
    dtype: o.Dtype = _D.dtype,
    verify: o.Verify = _D.verify,
    host: o.Host = _D.host,
    port: o.Port = _D.port,
    max_body: o.MaxBody = _D.max_body,
    drain_timeout: o.DrainTimeout = _D.drain_timeout,
    stall_timeout: o.StallTimeout = _D.stall_timeout,
    worker_nice: o.WorkerNice = _D.worker_nice,
    worker_cpus: o.WorkerCpus = _D.worker_cpus,
    root_path: o.RootPath = _D.root_path,
    ui: o.Ui = _D.ui,
    sse_keepalive: o.SseKeepalive = _D.sse_keepalive,
    max_restarts: o.MaxRestarts = _D.max_restarts,
    metrics_prefix: o.MetricsPrefix = _D.metrics_prefix,
    log_level: o.LogLevel = _D.log_level,
    request_log: o.RequestLog = _D.request_log,
    request_log_text: o.RequestLogText = _D.request_log_text,
    otlp_traces_endpoint: o.OtlpTraces = _D.otlp_traces_endpoint,
    api_key: o.ApiKey = _D.api_key,
    priority_keys: o.PriorityKeys = _D.priority_keys,
    api_key_file: o.ApiKeyFile = _D.api_key_file,
    allowed_origins: o.AllowedOrigins = _D.allowed_origins,
    ssl_keyfile: o.SslKey = _D.ssl_keyfile,
    ssl_certfile: o.SslCert = _D.ssl_certfile,
    max_model_len: o.MaxModelLen = _D.max_model_len,
    kv_cache_dtype: o.KvCacheDtype = _D.kv_cache_dtype,
    kv_cache_memory: o.KvCacheMemory = _D.kv_cache_memory,
    gpu_memory_utilization: o.GpuMemoryUtilization = _D.gpu_memory_utilization,
    block_size: o.BlockSize = _D.block_size,
    enable_prefix_caching: o.PrefixCaching = _D.enable_prefix_caching,
    max_num_seqs: o.MaxNumSeqs = _D.max_num_seqs,
    max_num_batched_tokens: o.MaxBatchedTokens = _D.max_num_batched_tokens,
    enforce_eager: o.EnforceEager = _D.enforce_eager,
    enable_chunked_prefill: o.ChunkedPrefill = _D.enable_chunked_prefill,
    scheduling_policy: o.Policy = _D.scheduling_policy,
    max_num_queued_reqs: o.MaxQueued = _D.max_num_queued_reqs,
    itl_target: o.ItlTarget = _D.itl_target,
    deadline: o.DeadlineOption = _D.deadline,
    shed: o.Shed = _D.shed,
    threads: o.Threads = _D.threads,
    seed: o.Seed = _D.seed,
    enable_lora: o.EnableLora = _D.enable_lora,
    lora_modules: o.LoraModules = list(_D.lora_modules),  # noqa: B006
    max_loras: o.MaxLoras = _D.max_loras,
    max_lora_rank: o.MaxLoraRank = _D.max_lora_rank,
    max_cpu_loras: o.MaxCpuLoras = _D.max_cpu_loras,
    lora_dir: o.LoraDir = _D.lora_dir,
    quantization: o.Quantization = _D.quantization,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Serve a model behind an OpenAI-compatible API.

    What is not an engine yet is built first, into the folder that LLMCTL_CACHE names, else ~/.cache/llmctl (or below
    XDG_CACHE_HOME). SIGTERM drains; a second one stops at once.

    Example: [bold]llmctl serve --model ./engine --port 8000[/bold]
    """
    if lora_modules:  # vLLM's way: several words after one --lora-modules
        while ctx.args and ("=" in ctx.args[0] or ctx.args[0].startswith("{")):
            lora_modules = [*lora_modules, ctx.args.pop(0)]
    if ctx.args:  # not shown: after a comma too many it is a key
        raise UsageError(
            "unexpected extra argument",
            fix="one MODEL, with --model or without; several names are --served-model-name A --served-model-name B",
        )
    settings = ServeConfig(
        model=model,
        as_family=as_family,
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
        prefill_assistant=prefill_assistant,
        generation_config=generation_config,
        pooling=pooling,
        api_key=api_key,
        priority_keys=priority_keys,
        api_key_file=api_key_file,
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        max_body=max_body,
        drain_timeout=drain_timeout,
        stall_timeout=stall_timeout,
        worker_nice=worker_nice,
        worker_cpus=worker_cpus,
        root_path=root_path,
        ui=ui,
        sse_keepalive=sse_keepalive,
        allowed_origins=allowed_origins,
        max_restarts=max_restarts,
        metrics_prefix=metrics_prefix,
        log_level=log_level,
        request_log=request_log,
        request_log_text=request_log_text,
        otlp_traces_endpoint=otlp_traces_endpoint,
        enable_lora=enable_lora,
        lora_modules=tuple(lora_modules),
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        max_cpu_loras=max_cpu_loras,
        lora_dir=lora_dir,
    )
    from llmctl.serving.launch import run_server

    run_server(settings, ctx.obj)
