"""Shared by the tests: a two-layer Llama small enough to make in a test, and a real server process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.bench.local_server import free_port
from llmctl.checkpoint.user_folders import cache_dir

CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_KERNELS = cache_dir() / "kernels"  # asked now: tests change where it is
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

LOOP_TEXT = "é日🎉"
"""Once the tiny model has produced (or been given) the first byte of this text, greedy decoding repeats it for ever.

Every byte of it is a token of its own and occurs once, so the loop is a plain successor table; its characters of two,
three and four bytes arrive one byte a token.
"""

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then sits down to read a book about engines and kernels. "
    "a model is a graph, a graph is data, and data is read by an interpreter that writes numbers into a cache. "
    "stop here or go on: the answer to the question is that every question has an answer of its own."
)


def share_compiled_kernels(cache: Path) -> Path:
    """Make ``cache`` a folder for LLMCTL_CACHE that is empty but for the machine's compiled kernels: they take 25 s."""
    _KERNELS.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "kernels").exists():
        (cache / "kernels").symlink_to(_KERNELS)
    return cache


def make_tokenizer(folder: Path, vocab_size: int = 384) -> int:
    """Write a byte-level BPE tokenizer with a chat template; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(tokenizer.get_vocab_size())


def make_tiny_llama(folder: Path, *, seed: int = 0, hidden_size: int = 64, max_position: int = 512) -> Path:
    """Write a random two-layer Llama checkpoint (GQA, untied head) with tokenizer; returns the folder.

    Its text is noise that depends on the whole context, except that it knows LOOP_TEXT. Written without torch or
    transformers, which take seconds to import; transformers loads it like any other checkpoint.
    """
    from safetensors.numpy import save_file

    vocab_size = make_tokenizer(folder)
    heads, kv_heads, inner = 4, 2, 2 * hidden_size
    kv_size = hidden_size // heads * kv_heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    shapes = {"model.embed_tokens": (vocab_size, hidden_size), "lm_head": (vocab_size, hidden_size)}
    for layer in range(2):
        block = f"model.layers.{layer}."
        shapes |= {
            block + "self_attn.q_proj": (hidden_size, hidden_size),
            block + "self_attn.k_proj": (kv_size, hidden_size),
            block + "self_attn.v_proj": (kv_size, hidden_size),
            block + "self_attn.o_proj": (hidden_size, hidden_size),
            block + "mlp.gate_proj": (inner, hidden_size),
            block + "mlp.up_proj": (inner, hidden_size),
            block + "mlp.down_proj": (hidden_size, inner),
        }
    rng = np.random.default_rng(seed)
    tensors = {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ["model.norm"] + [
        f"model.layers.{i}.{n}" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")
    ]
    tensors |= {f"{name}.weight": np.ones(hidden_size, np.float32) for name in norms}
    _teach_loop(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"], _byte_tokens(folder, LOOP_TEXT), rng)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 2}))
    return folder


def _byte_tokens(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode()), "a merge joins bytes of the loop"
    assert len(set(ids)) == len(ids), "a byte of the loop repeats"
    return ids


def _teach_loop(embedding: NDArray[Any], head: NDArray[Any], ids: list[int], rng: np.random.Generator) -> None:
    """Make each id's successor its greedy continuation: embeddings that outweigh what the layers add, and a head that
    reads them."""
    directions = np.linalg.qr(rng.normal(size=(embedding.shape[1], len(ids))))[0].T
    for i, token in enumerate(ids):
        embedding[token] = directions[i] * 100
        head[ids[(i + 1) % len(ids)]] = directions[i] * 0.8


class ServerProcess:
    """A real ``llmctl serve`` on a free port. As a context manager it leaves no process behind."""

    def __init__(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        scheme: str = "http",
        llmctl: Sequence[str] = (sys.executable, "-m", "llmctl"),
    ) -> None:
        """``llmctl``: the command. ``env``: beside this process's own."""
        self.port = free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._folder = Path(tempfile.mkdtemp(prefix="llmctl-test-"))
        self._log = self._folder / "log"
        self.tmp = self._folder / "tmp"
        self.tmp.mkdir()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*llmctl, "serve", "--port", str(self.port), *args],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.tmp), **(env or {})},
            )
        self._worker_pid: int | None = None

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def output(self) -> str:
        """stdout and stderr so far."""
        return self._log.read_text()

    @property
    def worker_pid(self) -> int:
        """Process id of its worker."""
        import psutil

        if self._worker_pid is None:
            (self._worker_pid,) = [child.pid for child in psutil.Process(self.process.pid).children()]
        return self._worker_pid

    def leftovers(self) -> list[str]:
        """Names of files in the temporary folder that it was given."""
        return sorted(p.name for p in self.tmp.iterdir())

    def get(self, path: str, timeout: float = 10) -> tuple[int, str]:
        """Status and text of a GET."""
        return fetch(self.url + path, timeout=timeout)

    def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        status, text = fetch(self.url + path, json.dumps(body).encode(), headers)
        return status, json.loads(text)

    def wait_ready(self, timeout: float = 60) -> None:
        """Until ``/ready`` says 200."""
        self.wait_status("/ready", 200, timeout)
        assert self.worker_pid

    def wait_status(self, path: str, status: int, timeout: float = 20) -> str:
        """Until ``path`` answers ``status``; the text of that answer."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            assert self.process.poll() is None, self.output
            try:
                found, text = self.get(path)
            except OSError:
                found, text = 0, ""
            if found == status:
                return text
            time.sleep(0.05)
        raise AssertionError(f"{path}: no {status} within {timeout} s; last {found}: {text}\n{self.output}")

    def wait_load(self, running: int, waiting: int = 0, timeout: float = 20) -> None:
        """Until so many requests run and wait."""
        wanted, end = [running, waiting], time.monotonic() + timeout
        while (found := [self.metric(f"llmctl:num_requests_{kind}") for kind in ("running", "waiting")]) != wanted:
            assert time.monotonic() < end, f"never {running} running and {waiting} waiting: {found}\n{self.output}"
            time.sleep(0.01)

    def metric(self, name: str) -> float:
        """Sum of a series over its labels."""
        _, text = self.get("/metrics")
        lines = [line for line in text.splitlines() if line.startswith(name + "{")]
        assert lines, f"no series {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def fetch(
    url: str, data: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 30
) -> tuple[int, str]:
    """Status and text of a request, whatever the status."""
    context = ssl._create_unverified_context() if url.startswith("https") else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
