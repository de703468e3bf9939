"""Small tokenizers made on the spot: byte-level BPE (GPT-2, Llama 3, Qwen), sentencepiece-style BPE with byte
fallback (Llama 2, Mistral), Unigram with a Metaspace decoder (T5's kind)."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from llmctl.text.tokenizer import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "你好，世界。今天天气很好。",
    "Emoji: 😀 😃 👩‍👩‍👧 🇩🇪 é ü ñ — “quotes”",
    "def f(x):\n    return x + 1\n\n",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False), AddedToken("é̂", special=False)])
    return backend


def byte_fallback_backend() -> Backend:
    words = ["▁", "▁the", "▁The", "fox", "▁fox", "dog", "▁dog", ".", "s", "▁▁", "e", "a", "b", "é", "世", "▁▁▁▁", "a▁b"]
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *words])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return backend


def metaspace_backend() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@cache
def byte_fallback() -> Tokenizer:
    return Tokenizer(byte_fallback_backend(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@cache
def metaspace() -> Tokenizer:
    return Tokenizer(metaspace_backend(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
