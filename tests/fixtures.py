"""Models small enough to make in a test: a two-layer Llama with its own byte-level tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
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

    Its text is noise that depends on the whole context, except that it knows LOOP_TEXT.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=2,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    _teach_loop(model, _byte_tokens(folder, LOOP_TEXT))
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 2}))
    return folder


def _byte_tokens(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode()), "a merge joins bytes of the loop"
    assert len(set(ids)) == len(ids), "a byte of the loop repeats"
    return ids


def _teach_loop(model: object, ids: list[int]) -> None:
    """Make each id's successor its greedy continuation: embeddings that outweigh what the layers add, and a head that
    reads them."""
    import torch

    embedding = model.model.embed_tokens.weight.data  # type: ignore[attr-defined]
    head = model.lm_head.weight.data  # type: ignore[attr-defined]
    width = embedding.shape[1]
    directions = torch.linalg.qr(torch.randn(width, len(ids)))[0].T
    for i, token in enumerate(ids):
        embedding[token] = directions[i] * 100
        head[ids[(i + 1) % len(ids)]] = directions[i] * 0.8
