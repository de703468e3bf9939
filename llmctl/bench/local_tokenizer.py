"""Counting tokens with a tokenizer on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmctl.bench.workloads import TokenCounter
from llmctl.text.tokenizer import Tokenizer


def local_counter(name: str, *, special: bool) -> TokenCounter:
    """Counts tokens as the model would.

    Args:
        name: a folder with tokenizer.json, that file itself, a .gguf file, or any model name.
        special: whether the tokens that the model puts around a prompt count.

    Raises:
        ModelNotFoundError, CheckpointError: no such model, or no tokenizer in it.
    """
    tokenizer = load_tokenizer(name)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(tokenizer.encode(text, add_special_tokens=special)) for text in texts]

    return count


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder, tokenizer.json, .gguf file or model name."""
    path = Path(name)
    if path.name == "tokenizer.json" and path.is_file():
        return Tokenizer.from_folder(path.parent)
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_folder(path)
    from llmctl.checkpoint.opening import open_checkpoint
    from llmctl.checkpoint.resolve import resolve_model

    return Tokenizer.from_files(open_checkpoint(resolve_model(name)).aux_files(), where=name)


def chunk_lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens that each piece of a text adds to it, as the text so far is encoded."""
    lengths, text, before = [], "", 0
    for piece in texts:
        text += piece
        now = len(tokenizer.encode(text, add_special_tokens=False))
        lengths.append(max(0, now - before))
        before = max(before, now)
    return lengths
