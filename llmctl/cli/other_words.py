"""Words of other tools on our command line: what they are called here. A table of options, one of commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

OPTIONS: Mapping[str, tuple[str, ...]] = {
    # llama.cpp
    "--max-model-len TOKENS": (
        "-c", "--ctx-size", "--context-length", "--max-seq-len", "--max-total-tokens", "--num-ctx",
        "--max-kv-size", "--max_seq_len", "--context-size",
    ),
    "--target cuda, which puts all layers on the GPU (--target cpu: none)": (
        "-ngl", "--gpu-layers", "--n-gpu-layers", "--device", "--num-gpu",
    ),
    "--threads N": ("-t", "-tb", "--threads-batch", "--num-threads"),
    "--max-num-seqs N": (
        "-np", "--parallel", "--max-batch-size", "--max_batch_size", "--max-running-requests", "--num-parallel",
    ),
    "--max-num-batched-tokens N": (
        "-b", "-ub", "--ubatch-size", "--chunked-prefill-size", "--max-batch-prefill-tokens", "--max_num_tokens",
    ),
    "--max-num-queued-reqs N": ("--max-concurrent-requests", "--max-queue"),
    "--max-tokens TOKENS of llmctl run, or max_tokens of a request": (
        "-n", "--n-predict", "--predict", "--max-new-tokens", "--num-predict",
    ),
    "--temperature NUMBER of llmctl run, or temperature of a request": ("--temp",),
    "--repetition-penalty NUMBER of llmctl run, or repetition_penalty of a request": ("--repeat-penalty",),
    "--system TEXT": ("-sys", "--system-prompt"),
    "--raw": ("-no-cnv", "--no-conversation", "--no-chat-template", "--ignore-chat-template"),
    "--kv-cache-dtype DTYPE": ("-ctk", "-ctv", "--cache-type-k", "--cache-type-v", "--kv-cache-type"),
    "--chat-template FILE": ("--chat-template-file",),
    "--served-model-name NAME": ("-a", "--alias"),
    "--lora-modules NAME=PATH": ("--lora", "--lora-paths", "--lora-adapters", "--lora-scaled"),
    "--gpu-memory-utilization SHARE": ("--mem-fraction-static", "--kv-cache-free-gpu-memory-fraction"),
    "--metrics-prefix NAME, for /metrics is always there": ("--metrics", "--enable-metrics"),
    "--no-enable-prefix-caching": ("--disable-radix-cache", "--no-cache-prompt"),
    "--ssl-keyfile FILE": ("--ssl-key-file",),
    "--ssl-certfile FILE": ("--ssl-cert-file",),
    "--model MODEL, or the model without an option": (
        "-hf", "-hfr", "--hf-repo", "--model-id", "--model-path", "--model_dir", "--checkpoint_dir", "--checkpoint-dir",
    ),
    "--output DIR": ("--output_dir", "--output-dir", "--outfile", "--mlx-path", "--out"),
    "--bits N": ("--q-bits", "--wbits", "--w-bit", "--qformat"),
    "--group-size N": ("--q-group-size", "--awq_block_size", "--q_group_size"),
    "--calib SOURCE": ("--imatrix", "--calib_dataset", "--calib-dataset", "--dataset"),
    "--num-prompts N": ("--num-requests", "--request-count"),
    "--max-concurrency N": ("--concurrency", "--rate-concurrency"),
    "--request-rate R": ("--rate", "--qps"),
    "--input-len N": ("-pp", "--n-prompt", "--random-input-len", "--isl", "--random-input"),
    "--output-len N": ("-tg", "--n-gen", "--random-output-len", "--osl", "--random-output"),
}  # fmt: skip
"""An option of ours as the hint shows it -> what others call it."""

WITHOUT: Mapping[str, tuple[str, ...]] = {
    "weights are always mapped from the engine's files": ("--mmap", "--no-mmap", "--mlock"),
    "attention kernels are the target's own": ("-fa", "--flash-attn", "--attention-backend"),
    "the model's Jinja template is always used": ("--jinja",),
    'the prompt is a word of its own: llmctl run MODEL "PROMPT"': ("-p", "--prompt", "-f", "--file"),
    "llmctl run is a conversation without it": ("-i", "-cnv", "--interactive", "--conversation"),
    "progress is on stderr, and --log-level is serve's": ("-v", "--verbose"),
}
"""Why an option of others is not needed -> its names."""

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "llmctl run MODEL, which fetches what it is given first (serve and build do so, too)": ("pull", "download", "get"),
    'llmctl run MODEL "PROMPT"': ("generate", "complete", "cli", "ask", "prompt", "infer"),
    "llmctl serve MODEL": ("start", "server", "api", "launch", "launch_server", "up"),
    "llmctl list": ("ls", "models", "cache", "scan-cache"),
    "llmctl rm NAME": ("remove", "delete", "prune", "uninstall"),
    "Ctrl-C, or SIGTERM to llmctl serve": ("stop", "kill", "down"),
    "GET /v1/models of a running server; llmctl list shows what is cached": ("ps", "status"),
    "llmctl build MODEL --output DIR": ("compile", "create", "trtllm-build", "engine"),
    "llmctl quantize MODEL --output DIR": ("quant", "quantise", "awq", "gptq"),
    "llmctl bench throughput MODEL, or llmctl bench serve": ("benchmark", "perf", "llama-bench"),
    "llmctl eval MODEL": ("perplexity", "ppl", "evaluate"),
    "llmctl show NAME": ("info",),
    "llmctl doctor": ("env", "collect-env", "check", "version"),
    "llmctl --help": ("help",),
}
"""A command of ours, or what is done instead -> what others call it."""


def _by_word(table: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {word: ours for ours, words in table.items() for word in words}


_OPTION, _WITHOUT, _COMMAND = map(_by_word, (OPTIONS, WITHOUT, COMMANDS))


def option_hint(
    refused: str, args: Iterable[str], command: str, having: Mapping[str, Sequence[str]]
) -> tuple[str, str] | None:
    """An option that a command does not have, and what to write in its place; None where there is nothing to say.

    Args:
        refused: as the parser names it: of ``-ngl`` it has seen the first letter. args: the command line.
        command: the one that was called. having: an option of ours -> the commands that have it.
    """
    for arg in args:
        word = arg.partition("=")[0]
        if word != refused and not (len(refused) == 2 and word.startswith(refused) and word[:2] != "--"):
            continue
        if word in _WITHOUT:
            return word, f"leave it out: {_WITHOUT[word]}"
        if word in _OPTION:
            ours = _OPTION[word]
            owners = having.get(ours.split()[0].rstrip(","), ())
            elsewhere = len(ours.split()) <= 2 and command not in owners
            return word, f"here it is {ours}" + (f" of {', '.join(owners)}" if elsewhere else "")
    return None


def command_hint(name: str) -> str | None:
    """What to write in place of a command that there is not; None where there is nothing to say."""
    return _COMMAND.get(name)
