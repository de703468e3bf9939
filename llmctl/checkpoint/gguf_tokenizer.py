"""The tokenizer inside a GGUF file as tokenizer.json, tokenizer_config.json and generation_config.json.

Byte-level BPE only (``tokenizer.ggml.model == "gpt2"``). Pre-tokenizers are those of the models' own tokenizer.json,
checked against the regular expressions in llama.cpp's llama-vocab.cpp. The bytes written depend on the metadata alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.checkpoint.gguf_header import shown
from llmctl.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4
# Keys of ``general.sampling`` to transformers' names.
_SAMPLING = {
    **{"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"},
    "penalty_repeat": "repetition_penalty",
}

# Token texts that llama.cpp takes as end of generation whatever eos says (llama-vocab.cpp, special_eog_ids).
_END_TEXTS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <EOT>".split()
)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before BPE.

    Attributes:
        regex: split pattern; None uses GPT-2's, built into ByteLevel.
        digits: every digit stands alone.
        nfc: text is normalised to NFC first.
        ignore_merges: a word that is in the vocabulary is taken whole.
        add_bos: whether a GGUF that does not say adds a BOS token.
    """

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def stages(self) -> list[dict[str, Any]]:
        """The ``pre_tokenizer`` stages of tokenizer.json."""
        stages: list[dict[str, Any]] = []
        if self.digits:
            stages.append({"type": "Digits", "individual_digits": True})
        if self.regex:
            pattern = {"Regex": self.regex}
            stages.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        return [*stages, _byte_level(use_regex=self.regex is None)]


_LLAMA_BPE = PreTokenizer(regex=_LLAMA3, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "qwen2": PreTokenizer(regex=_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(regex=_QWEN2, nfc=True),
}


def synthesise_aux_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, by name.

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: another tokenizer model, an unknown pre-tokenizer, or damaged tables.
    """
    vocabulary = _Vocabulary(metadata, where)
    documents = {
        "generation_config.json": vocabulary.generation_config(),
        "tokenizer.json": vocabulary.tokenizer(),
        "tokenizer_config.json": vocabulary.tokenizer_config(),
    }
    return {
        name: (json.dumps(document, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2) + "\n").encode()
        for name, document in documents.items()
    }


class _Vocabulary:
    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        model, pre = (_text(metadata, key, where) for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"))
        if model != "gpt2":
            raise CheckpointError(
                f"{where}: tokenizer model '{model}' is not read from GGUF; known: gpt2 (byte-level BPE)"
            )
        if pre not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise CheckpointError(f"{where}: pre-tokenizer '{pre}' is not known; known: {known}")
        self.metadata, self.where, self.pre = metadata, where, PRE_TOKENIZERS[pre]
        self.tokens = self._strings("tokens")
        self.merges = [tuple(merge.split(" ")) for merge in self._strings("merges")]
        self.types = self._types()
        self._check()

    def _strings(self, key: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not value:
            raise CheckpointError(f"{self.where}: metadata tokenizer.ggml.{key}: expected a list of strings")
        return value

    def _types(self) -> list[int]:
        found = self.metadata.get("tokenizer.ggml.token_type")
        if found is None:
            return [1] * len(self.tokens)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
            raise CheckpointError(f"{self.where}: metadata tokenizer.ggml.token_type: expected a list of integers")
        return [int(kind) for kind in found]

    def _check(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            raise CheckpointError(f"{self.where}: a token occurs twice in tokenizer.ggml.tokens")
        if len(self.types) != len(self.tokens):
            raise CheckpointError(f"{self.where}: {len(self.tokens)} tokens but {len(self.types)} token types")
        wrong = next((merge for merge in self.merges if len(merge) != 2), None)
        if wrong is not None:
            raise CheckpointError(f"{self.where}: merge {' '.join(wrong)!r} is not a pair")

    def _id(self, key: str) -> int | None:
        token = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is None:
            return None
        if type(token) is not int:
            raise CheckpointError(
                f"{self.where}: metadata tokenizer.ggml.{key}_token_id: expected an integer, found {shown(token)}"
            )
        return token if 0 <= token < len(self.tokens) else None

    def _text(self, key: str) -> str | None:
        token = self._id(key)
        return None if token is None else self.tokens[token]

    def _adds(self, key: str, default: bool) -> bool:
        wanted = self.metadata.get(f"tokenizer.ggml.add_{key}_token", default)
        if not isinstance(wanted, bool):
            raise CheckpointError(
                f"{self.where}: metadata tokenizer.ggml.add_{key}_token: expected true or false, found {shown(wanted)}"
            )
        return wanted and self._id(key) is not None

    def tokenizer(self) -> dict[str, Any]:
        stages = self.pre.stages()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "NFC"} if self.pre.nfc else None,
            "pre_tokenizer": stages[0] if len(stages) == 1 else {"type": "Sequence", "pretokenizers": stages},
            "post_processor": self._post_processor(),
            "decoder": _byte_level(add_prefix_space=True),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.pre.ignore_merges,
                "vocab": {token: i for i, token in enumerate(self.tokens)},
                "merges": self.merges,
            },
        }

    def _added_tokens(self) -> list[dict[str, Any]]:
        return [
            {
                "id": i,
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == _CONTROL,
            }
            for i, kind in enumerate(self.types)
            if kind in (_CONTROL, _USER_DEFINED)
        ]

    def _post_processor(self) -> dict[str, Any] | None:
        before = [self._text("bos")] if self._adds("bos", self.pre.add_bos) else []
        after = [self._text("eos")] if self._adds("eos", False) else []
        if not before and not after:
            return None

        def piece(sequence: str, type_id: int) -> list[dict[str, Any]]:
            special = [
                [{"SpecialToken": {"id": text, "type_id": type_id}} for text in side] for side in (before, after)
            ]
            return [*special[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *special[1]]

        used = {text: self.tokens.index(text) for text in [*before, *after] if text is not None}
        return {
            "type": "TemplateProcessing",
            "single": piece("A", 0),
            "pair": [*piece("A", 0), *piece("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in used.items()},
        }

    def tokenizer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "add_bos_token": self._adds("bos", self.pre.add_bos),
            "add_eos_token": self._adds("eos", False),
            "add_prefix_space": False,
            "bos_token": self._text("bos"),
            "clean_up_tokenization_spaces": False,
            "eos_token": self._text("eos"),
            "model_max_length": self._context_length(),
            "pad_token": self._text("padding"),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": self._text("unknown"),
        }
        template = self.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            config["chat_template"] = template
        return config

    def _context_length(self) -> int | None:
        length = self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length")
        return length if type(length) is int else None

    def generation_config(self) -> dict[str, Any]:
        """``eos_token_id``: the file's EOS first, then its end-of-turn tokens and those known by their text.

        With what the file recommends for sampling.
        """
        first = self._id("eos")
        others = {self._id("eot"), self._id("eom")}
        others |= {i for i, kind in enumerate(self.types) if kind == _CONTROL and self.tokens[i] in _END_TEXTS}
        ends = ([] if first is None else [first]) + sorted(i for i in others if i is not None and i != first)
        fields: dict[str, Any] = {
            "bos_token_id": self._id("bos"),
            "eos_token_id": ends or None,
            "pad_token_id": self._id("padding"),
        }
        for theirs, ours in _SAMPLING.items():
            value = self.metadata.get(f"general.sampling.{theirs}")
            if isinstance(value, int | float) and math.isfinite(value):
                fields[ours] = float(f"{value:.6g}") if isinstance(value, float) else value  # 0.7 is kept as float32
        return {key: value for key, value in fields.items() if value is not None}


def _text(metadata: Mapping[str, Any], key: str, where: str) -> str | None:
    found = metadata.get(key)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{where}: metadata {key}: expected text, found {shown(found)}")
    return found


def _byte_level(*, use_regex: bool = True, add_prefix_space: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}
