"""The tokenizer inside a GGUF file as tokenizer.json, tokenizer_config.json and generation_config.json.

Byte-level BPE (``tokenizer.ggml.model == "gpt2"``) and sentencepiece with scores ("llama"). The bytes written depend
on the metadata alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

from llmctl.checkpoint.gguf_header import shown
from llmctl.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer, byte_level
from llmctl.checkpoint.gguf_spm import ROLES, spm_parts
from llmctl.checkpoint.gguf_vocabulary import CONTROL, Vocabulary
from llmctl.errors import CheckpointError

TOKENIZER_MODELS = {"gpt2": "byte-level BPE", "llama": "sentencepiece with scores"}
# Keys of ``general.sampling`` to transformers' names.
_SAMPLING = {
    **{"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"},
    "penalty_repeat": "repetition_penalty",
}
_OF_SAMPLED = frozenset({"temperature", "top_p", "top_k", "min_p"})
"""What transformers takes of a model that samples only."""

# Token texts that llama.cpp takes as end of generation whatever eos says (llama-vocab.cpp, special_eog_ids).
_END_TEXTS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <EOT>".split()
)


def synthesise_aux_files(
    metadata: Mapping[str, Any], where: str, sampling: Mapping[str, float] = MappingProxyType({})
) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, by name.

    Args:
        where: the file, for messages.
        sampling: recommended beside what the file itself recommends, by generation_config's names.

    Raises:
        UnsupportedModelError: a vocabulary that tokenizer.json cannot say exactly.
        CheckpointError: another tokenizer model, an unknown pre-tokenizer, or damaged tables.
    """
    made = _Documents(metadata, where)
    documents = {
        "generation_config.json": _sampled({**sampling, **made.generation_config()}),
        "tokenizer.json": made.tokenizer(),
        "tokenizer_config.json": made.tokenizer_config(),
    }
    return {
        name: (json.dumps(document, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2) + "\n").encode()
        for name, document in documents.items()
    }


def end_ids(metadata: Mapping[str, Any], where: str) -> frozenset[int]:
    """Ids that end a generation: the file's own, and those known by their text; errors as ``synthesise_aux_files``."""
    return frozenset(_Documents(metadata, where).generation_config().get("eos_token_id", ()))


class _Documents:
    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        model = _text(metadata, "tokenizer.ggml.model", where)
        if model not in TOKENIZER_MODELS:
            known = ", ".join(f"{name} ({what})" for name, what in TOKENIZER_MODELS.items())
            raise CheckpointError(f"{where}: tokenizer model '{model}' is not read from GGUF; known: {known}")
        self._metadata = metadata
        is_spm = model == "llama"
        self._vocabulary = Vocabulary(metadata, where, ROLES if is_spm else None)
        self._pre = None if is_spm else _pre_tokenizer(metadata, where)
        self._adds_bos = self._pre is None or self._pre.add_bos

    @cached_property
    def _parts(self) -> dict[str, Any]:
        return spm_parts(self._vocabulary) if self._pre is None else _byte_level_parts(self._vocabulary, self._pre)

    def tokenizer(self) -> dict[str, Any]:
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._vocabulary.added_tokens(),
            "normalizer": self._parts["normalizer"],
            "pre_tokenizer": self._parts["pre_tokenizer"],
            "post_processor": self._post_processor(),
            "decoder": self._parts["decoder"],
            "model": self._parts["model"],
        }

    def _post_processor(self) -> dict[str, Any] | None:
        words = self._vocabulary
        before = [words.text("bos")] if words.adds("bos", self._adds_bos) else []
        after = [words.text("eos")] if words.adds("eos", False) else []
        if not before and not after:
            return None

        def piece(sequence: str, type_id: int) -> list[dict[str, Any]]:
            special = [
                [{"SpecialToken": {"id": text, "type_id": type_id}} for text in side] for side in (before, after)
            ]
            return [*special[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *special[1]]

        used = {text: words.tokens.index(text) for text in [*before, *after] if text is not None}
        return {
            "type": "TemplateProcessing",
            "single": piece("A", 0),
            "pair": [*piece("A", 0), *piece("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in used.items()},
        }

    def tokenizer_config(self) -> dict[str, Any]:
        words = self._vocabulary
        config: dict[str, Any] = {
            "add_bos_token": words.adds("bos", self._adds_bos),
            "add_eos_token": words.adds("eos", False),
            "add_prefix_space": False,
            "bos_token": words.text("bos"),
            "clean_up_tokenization_spaces": False,
            "eos_token": words.text("eos"),
            "model_max_length": self._context_length(),
            "pad_token": words.text("padding"),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": words.text("unknown"),
        }
        template = self._metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            config["chat_template"] = template
        return config

    def _context_length(self) -> int | None:
        length = self._metadata.get(f"{self._metadata.get('general.architecture')}.context_length")
        return length if type(length) is int else None

    def generation_config(self) -> dict[str, Any]:
        """``eos_token_id``: the file's EOS first, then its end-of-turn tokens and those known by their text.

        With what the file recommends for sampling.
        """
        words = self._vocabulary
        first = words.id("eos")
        others = {words.id("eot"), words.id("eom")}
        others |= {i for i, kind in enumerate(words.types) if kind == CONTROL and words.tokens[i] in _END_TEXTS}
        ends = ([] if first is None else [first]) + sorted(i for i in others if i is not None and i != first)
        fields: dict[str, Any] = {
            "bos_token_id": words.id("bos"),
            "eos_token_id": ends or None,
            "pad_token_id": words.id("padding"),
        }
        for theirs, ours in _SAMPLING.items():
            value = self._metadata.get(f"general.sampling.{theirs}")
            if isinstance(value, int | float) and math.isfinite(value):
                fields[ours] = float(f"{value:.6g}") if isinstance(value, float) else value  # 0.7 is kept as float32
        return {key: value for key, value in fields.items() if value is not None}


def _sampled(config: dict[str, Any]) -> dict[str, Any]:
    """With the ``do_sample`` without which transformers refuses to save one that has, say, a temperature. One of 0 is
    its way to say greedy, which transformers has no temperature for; a penalty alone says nothing of it."""
    if config.get("temperature") == 0:
        return {name: value for name, value in config.items() if name not in _OF_SAMPLED} | {"do_sample": False}
    return config | ({"do_sample": True} if config.keys() & _OF_SAMPLED else {})


def _pre_tokenizer(metadata: Mapping[str, Any], where: str) -> PreTokenizer:
    """The file's; CheckpointError where it is not known."""
    pre = _text(metadata, "tokenizer.ggml.pre", where)
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{where}: pre-tokenizer '{pre}' is not known; known: gpt-2, llama-bpe, qwen2 and "
            f"{len(PRE_TOKENIZERS) - 3} more (docs/formats.md)"
        )
    return PRE_TOKENIZERS[pre]


def _byte_level_parts(vocabulary: Vocabulary, row: PreTokenizer) -> dict[str, Any]:
    """tokenizer.json's normalizer, pre_tokenizer, decoder and model.

    Raises:
        CheckpointError: merges that are no pairs.
    """
    where = vocabulary.where
    merges = [tuple(merge.split(" ")) for merge in vocabulary.strings("merges")]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"{where}: merge {' '.join(wrong)!r} is not a pair")
    stages = row.stages()
    return {
        "normalizer": {"type": "NFC"} if row.nfc else None,
        "pre_tokenizer": stages[0] if len(stages) == 1 else {"type": "Sequence", "pretokenizers": stages},
        "decoder": byte_level(add_prefix_space=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": row.ignore_merges,
            "vocab": {token: i for i, token in enumerate(vocabulary.tokens)},
            "merges": merges,
        },
    }


def _text(metadata: Mapping[str, Any], key: str, where: str) -> str | None:
    found = metadata.get(key)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{where}: metadata {key}: expected text, found {shown(found)}")
    return found
