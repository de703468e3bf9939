"""Calibration tokens: from a text or JSON-lines file, from a hub data set, or written by the model itself.

Self-generated text (LLM-QAT, Liu et al., 2023) needs no data: every sample starts from the beginning-of-text token and
one random token, and goes on at temperature 1 through the engine. Everything is seeded.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmctl.errors import ModelNotFoundError, UsageError
from llmctl.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmctl.checkpoint.assemble import GraphSource

SELF = "self"
MIN_LENGTH = 3
"""Tokens of the shortest sample."""

_CHARS_PER_TOKEN = 64  # of a file's text read for each token wanted: plenty of choice, bounded work
_DATASET_ROWS = 20_000
_MAX_RUNNING = 64  # self-generated samples at once
_WIDE_BYTES = 2**30
"""Weights that are computed with in float32; larger models write their text in bfloat16, which a checkpoint of
bfloat16 is mapped as and not copied."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """Calibration data.

    Attributes:
        tokens: i32 ``[samples, length]``.
        note: one sentence on what was used, for the user.
    """

    tokens: Tensor
    note: str


def source_digest(spec: str) -> str:
    """sha256 of a calibration file's contents; "" for ``self`` and hub data sets.

    Raises:
        UsageError: a file name without a file behind it.
    """
    path = file_of(spec)
    if path is None:
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_of(spec: str) -> Path | None:
    """The file that ``--calib`` names; None for ``self`` and hub data sets.

    Raises:
        UsageError: it looks like a file but is none, or has another suffix than .txt, .jsonl.
    """
    if spec == SELF:
        return None
    path = Path(spec)
    if not path.exists():
        if path.suffix in (".txt", ".jsonl", ".json") or path.is_absolute() or spec.startswith("."):
            raise UsageError(f"--calib {spec}: no such file", param="calib")
        return None
    if not path.is_file() or path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            f"--calib {spec}: expected a .txt or .jsonl file, '{SELF}' or the name of a hub data set", param="calib"
        )
    return path


def read_calibration(spec: str, tokenizer: Tokenizer, samples: int, length: int, seed: int) -> Calibration:
    """Windows of ``length`` tokens from a file or a hub data set, chosen at random without overlap.

    Raises:
        UsageError: unreadable or malformed file, too little text, no such data set, or ``datasets`` is not installed.
    """
    path = file_of(spec)
    texts = _dataset_texts(spec) if path is None else _file_texts(path, tokenizer)
    wanted, tokens = samples * length * _CHARS_PER_TOKEN, []
    for text in texts:
        tokens += tokenizer.encode(text[:wanted], add_special_tokens=False)
        wanted -= len(text)
        if wanted <= 0:
            break
    if not tokens:
        raise UsageError(
            f"--calib {spec}: no text in it",
            fix=f"give a file with text, or --calib {SELF}: the model writes its own",
            param="calib",
        )
    windows = len(tokens) // length
    if not windows:
        raise UsageError(
            f"--calib {spec}: {len(tokens)} tokens of text are less than one sample",
            fix="use more text" + (f" or --calib-length {len(tokens)}" if len(tokens) >= MIN_LENGTH else ""),
            param="calib",
        )
    chosen = sorted(random.Random(seed).sample(range(windows), min(samples, windows)))
    rows = [tokens[w * length : (w + 1) * length] for w in chosen]
    short = f" (asked for {samples})" if len(rows) < samples else ""
    return Calibration(
        torch.tensor(rows, dtype=torch.int32), f"{len(rows)}{short} samples of {length} tokens of {spec}"
    )


def _file_texts(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row_text(_json_row(path, number, line), tokenizer, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise UsageError(f"--calib {path}: not UTF-8 text (byte {error.start})", param="calib") from error


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UsageError(f"--calib {path}:{number}: expected a JSON object a line", param="calib")
    return row


def _row_text(row: dict[str, Any], tokenizer: Tokenizer, where: str) -> str:
    """A row's text: ``text``, or ``messages`` through the model's chat template."""
    if isinstance(row.get("text"), str):
        return row["text"] + "\n\n"
    if isinstance(row.get("messages"), list):
        if tokenizer.chat_template is None:
            raise UsageError(f"--calib {where}: 'messages', but this model has no chat template", param="calib")
        return tokenizer.chat_template.render(row["messages"], add_generation_prompt=False)
    raise UsageError(
        f"--calib {where}: expected a key 'text' or 'messages', found {', '.join(sorted(row)) or 'none'}", param="calib"
    )


def _dataset_texts(spec: str) -> Iterator[str]:
    """Texts of a hub data set ``name[:config[:split]]``, streamed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"--calib {spec}: no such file, and hub data sets need the package 'datasets', which is not installed",
            fix="pip install datasets, or give a .txt or .jsonl file, or --calib self",
            param="calib",
        ) from error
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        found = [row["text"] for row in islice(rows, _DATASET_ROWS) if isinstance(row.get("text"), str)]
    except Exception as error:  # offline, unknown name, unknown config: whatever the library raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelNotFoundError(
            f"--calib {spec}: the data set cannot be read: {reason}",
            fix="give a .txt or .jsonl file, or --calib self",
            param="calib",
        ) from error
    if not found:
        raise UsageError(f"--calib {spec}: the data set has no column 'text'", param="calib")
    return iter(found)


def self_calibration(
    checkpoint: GraphSource,
    tokenizer: Tokenizer,
    vocab_size: int,
    samples: int,
    length: int,
    seed: int,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Text that the model writes itself through the engine.

    Args:
        vocab_size: the model's.
        on_progress: called with tokens written and wanted.
    """
    from llmctl.checkpoint.assemble import checkpoint_graph
    from llmctl.engine.llm_engine import LLMEngine
    from llmctl.engine.request import Request
    from llmctl.engine.sampling_params import SamplingParams, derive_seed
    from llmctl.engine.scheduler_config import SchedulerConfig
    from llmctl.targets.reference.weights import checkpoint_runtime

    rows = [list(prompt) for prompt in random_prompts(tokenizer, vocab_size, samples, seed)]
    running = min(samples, _MAX_RUNNING)
    weights = sum(math.prod(weight.shape) for weight in checkpoint_graph(checkpoint).weights.values())
    wide = 4 * weights <= _WIDE_BYTES
    runtime = checkpoint_runtime(
        checkpoint,
        passes=None if wide else (),  # merged weights would be copies
        dtype="float32" if wide else "bfloat16",
        num_blocks=running * (length // 16 + 1),
        max_model_len=length,
    )
    config = SchedulerConfig(max_num_seqs=running, max_num_queued_reqs=samples)
    engine = LLMEngine(runtime, config)
    for i, prompt in enumerate(rows):
        params = SamplingParams(
            temperature=1.0, seed=derive_seed(seed, i), max_tokens=length - len(prompt), ignore_eos=True
        )
        engine.add_request(Request(str(i), tuple(prompt), params))
    try:
        while engine.has_unfinished():
            for output in engine.step():
                rows[int(output.request_id)] += output.new_token_ids
            if on_progress is not None:
                on_progress(sum(map(len, rows)), samples * length)
    finally:
        engine.close()
    tokens = torch.tensor(rows, dtype=torch.int32)
    return Calibration(tokens, f"{samples} samples of {length} tokens written by the model itself (seed {seed})")


def random_prompts(tokenizer: Tokenizer, vocab_size: int, samples: int, seed: int) -> list[list[int]]:
    """Beginnings of self-generated text: begin-of-text (where the model has one), then one random ordinary token."""
    start = tokenizer.token_to_id(tokenizer.bos_token) if tokenizer.bos_token else None
    special = tokenizer.special_token_ids | tokenizer.eos_token_ids | {start}
    ordinary = [i for i in range(min(vocab_size, tokenizer.vocab_size)) if i not in special]
    chosen = random.Random(seed).choices(ordinary or range(vocab_size), k=samples)
    return [[token] if start is None else [start, token] for token in chosen]


def check_lengths(samples: int, length: int, longest: int) -> None:
    """Refuse sizes that make no calibration.

    Raises:
        UsageError: fewer than one sample or two tokens, or longer than the model's context.
    """
    if samples < 1:
        raise UsageError(f"--calib-samples {samples}: expected at least 1", param="calib_samples")
    if not MIN_LENGTH <= length <= longest:
        raise UsageError(
            f"--calib-length {length}: expected {MIN_LENGTH} to {longest}, the model's context", param="calib_length"
        )
