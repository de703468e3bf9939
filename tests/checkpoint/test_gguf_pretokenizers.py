"""Every pre-tokenizer's pieces, as llama.cpp cuts them: each case was compared with it."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from llmctl.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from llmctl.checkpoint.gguf_tokenizer import synthesise_aux_files
from llmctl.text.token_bytes import byte_level_alphabet

TEXT = "I'LL don't\r\n\n  camelCase ABCdef! 12345\t_x世界 é'S,end"
_LETTERS = {byte: letter for letter, byte in byte_level_alphabet().items()}


def pieces(pre: str, text: str) -> list[str]:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    document = json.loads(synthesise_aux_files(metadata, pre)["tokenizer.json"])
    found = Tokenizer.from_str(json.dumps(document)).pre_tokenizer.pre_tokenize_str(text)
    bytes_of = byte_level_alphabet()
    return [bytes(bytes_of[letter] for letter in piece).decode() for piece, _ in found]


GPT2 = "I|'|LL| don|'t|\r\n\n | camelCase| ABCdef|!| 12345|\t|_|x世界| é|'|S|,|end"
DIGITS = GPT2.replace(" 12345", " |1|2|3|4|5")
LLAMA3 = "I|'LL| don|'t|\r\n\n| | camelCase| ABCdef|!| |123|45|\t|_x世界| é|'S|,end"
QWEN2 = LLAMA3.replace("123|45", "1|2|3|4|5")
BLOOM = "I'LL| don't|\r\n\n | camelCase| ABCdef|!| 12345|\t|_x世界| é'S|,|end"
O200K = "I'LL| don't|\r\n\n| | camel|Case| ABCdef|!| |123|45|\t|_x世界| é'S|,end"
DEEPSEEK = "I|'|LL| don|'|t|\r|\n|\n| | camelCase| ABCdef|!| 12345|\t_|x|世界| é|'|S|,|end"
CUT = {
    "gpt-2 phi-2 jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling mpt olmo": GPT2,
    "smollm starcoder refact codeshell exaone minerva-7b mellum2 command-r": DIGITS,
    "falcon": GPT2.replace("'t", "'|t").replace(" 12345", " |123|45"),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4 glm5": LLAMA3,
    "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo f2llmv2 solar-open grok-2 qwen35 seed-coder": QWEN2,
    "bailingmoe bailingmoe2 llada-moe": QWEN2,
    "gpt-4o llama4 kanana2 minimax-m2": O200K,
    "tekken": QWEN2.replace("camelCase", "camel|Case"),
    "poro-chat bloom gpt3-finnish": BLOOM,
    "viking": BLOOM.replace("12345", "|1|2|3|4|5"),
    "deepseek-coder": DEEPSEEK.replace("12345", "|1|2|3|4|5"),
    "deepseek-llm": DEEPSEEK.replace(" 12345", " |12345"),
    "deepseek-v3 hunyuan-dense joyai-llm": LLAMA3.replace("_x世界", "_x|世界"),
}


def test_every_name_is_here() -> None:
    assert sorted(name for names in CUT for name in names.split()) == sorted(PRE_TOKENIZERS)


@pytest.mark.parametrize(("names", "wanted"), CUT.items())
def test_pieces(names: str, wanted: str) -> None:
    for name in names.split():
        assert "|".join(pieces(name, TEXT)) == wanted, name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("qwen2", "न|ी!\n\n|x"),
        ("qwen35", "नी|!\n\n|x"),
        ("seed-coder", "न|ी!|\n\n|x"),
        ("bailingmoe", "न|ी!\n\n|x"),
    ],
)
def test_marks_and_lines(name: str, wanted: str) -> None:
    assert "|".join(pieces(name, "नी!\n\nx")) == wanted


def test_words_that_are_taken_whole() -> None:
    whole = {name for name, row in PRE_TOKENIZERS.items() if row.ignore_merges}
    assert whole == set("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4 glm5 tekken".split())
    assert {name for name, row in PRE_TOKENIZERS.items() if row.add_bos} == whole - {"glm4", "glm5"}
    assert {name for name, row in PRE_TOKENIZERS.items() if row.nfc} == set(
        "mpt olmo command-r qwen2 qwen35 deepseek-r1-qwen".split()
    )
