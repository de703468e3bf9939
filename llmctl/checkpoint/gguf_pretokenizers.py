"""How byte-level BPE cuts text before merging, by the name a GGUF file gives it (``tokenizer.ggml.pre``).

Sources: the models' own tokenizer.json, and llama.cpp's llama-vocab.cpp, which knows the names. Where its expression
is one adapted to std::regex, the model's own is here: they part on letters with a case outside ASCII (``gpt-4o``,
``tekken``), and llama.cpp never normalises to NFC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Built into tokenizers' ByteLevel."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = _CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _PUNCTUATION + _LINES
_QWEN2 = _CONTRACTIONS + _WORD + r"|\p{N}" + _PUNCTUATION + _LINES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _LINES
_SEED_CODER = _CONTRACTIONS + _WORD + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _LINES
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """o200k's: a word ends where a capital follows a small letter."""
    first = r"[^\r\n\p{L}\p{N}]?"
    words = f"{first}{_UPPER}*{_LOWER}+{ending}|{first}{_UPPER}+{_LOWER}*{ending}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _LINES


_O200K = _cased(_CONTRACTIONS + "?", r"\p{N}{1,3}")
_TEKKEN = _cased("", r"\p{N}")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _LINES,
)
_CJK = r"[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    r"Ὗ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    r"𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_LLM = (r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before BPE.

    Attributes:
        splits: patterns, one after the other; what matches is a piece, and so is what lies between.
        digits: before them, every digit stands alone.
        nfc: text is normalised to NFC first.
        ignore_merges: a word that is in the vocabulary is taken whole.
        add_bos: whether a GGUF that does not say adds a BOS token.
    """

    splits: tuple[str, ...] = (GPT2,)
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def stages(self) -> list[dict[str, Any]]:
        """The ``pre_tokenizer`` stages of tokenizer.json."""
        stages: list[dict[str, Any]] = []
        if self.digits:
            stages.append({"type": "Digits", "individual_digits": True})
        built_in = self.splits[-1] == GPT2
        for regex in self.splits[:-1] if built_in else self.splits:
            pattern = {"Regex": regex}
            stages.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        return [*stages, byte_level(use_regex=built_in)]


def byte_level(*, use_regex: bool = True, add_prefix_space: bool = False) -> dict[str, Any]:
    """tokenizer.json's ByteLevel, a pre-tokenizer and a decoder."""
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def _rows(names: str, row: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), row)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_rows("gpt-2 phi-2 jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling", PreTokenizer()),
    **_rows("mpt olmo", PreTokenizer(nfc=True)),
    **_rows("smollm starcoder refact codeshell exaone minerva-7b mellum2", PreTokenizer(digits=True)),
    **_rows("command-r", PreTokenizer(digits=True, nfc=True)),
    **_rows("falcon", PreTokenizer(_FALCON)),
    **_rows(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **_rows("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    **_rows("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    **_rows("qwen2 deepseek-r1-qwen", PreTokenizer((_QWEN2,), nfc=True)),
    **_rows("stablelm2 hunyuan megrez kormo f2llmv2 solar-open grok-2", PreTokenizer((_QWEN2,))),
    **_rows("qwen35", PreTokenizer((_QWEN35,), nfc=True)),
    **_rows("seed-coder", PreTokenizer((_SEED_CODER,))),
    **_rows("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    **_rows("gpt-4o llama4 kanana2 minimax-m2", PreTokenizer((_O200K,))),
    **_rows("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    **_rows("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    **_rows("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    **_rows("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER)),
    **_rows("deepseek-llm", PreTokenizer(_DEEPSEEK_LLM)),
    **_rows("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer(_DEEPSEEK3)),
}
