"""GBNF as Lark: what it means, held against regular expressions of the same language; what is refused."""

from __future__ import annotations

import pytest
from small_tokenizers import byte_level

from llmctl.structured.compiler import CompiledGrammar, GrammarCompiler
from llmctl.structured.gbnf import GbnfError, gbnf_to_lark
from llmctl.structured.spec import GrammarSpec

TOKENIZER = byte_level()
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_token_ids)


def compiled(source: str) -> CompiledGrammar:
    return COMPILER.submit(GrammarSpec("gbnf", source)).result()


def matches(source: str, text: str) -> bool:
    """Whether a grammar takes a text, byte for byte: each byte of it is a token."""
    matcher = compiled(source).matcher()
    for byte in text.encode():
        token = next(i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) == bytes([byte]))
        matcher.accept(token)
        if matcher.problem:
            return False
    return matcher.complete


JSON = r"""root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
# Optional space
ws ::= | " " | "\n" [ \t]{0,20}
"""
ARITHMETIC = r"""root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""


@pytest.mark.parametrize(
    ("source", "yes", "no"),
    [
        (JSON, ['{"a": [1, 2.5, {"b": null}]}', "{}", '{"é\\u00e9": "\\n"}'], ['{"a"}', '{"a": 01}', "[]", "{} x"]),
        # What eats the line's end is not greedy: the end may still be the rule's own.
        (ARITHMETIC, ["a+1=2\n", "x=(1+2)\n", "x=(1 +2)\ny=3 \n\n"], ["x=(1+2)", "x=1*3\n", "=1\n"]),
        ('root ::= "a" [a-z]* "1" | "xyz2" | [x-z]+ "3"', ["abc1", "xyz2", "xyz3"], ["xya2", "a", "1"]),
        (r'root ::= "a\"b\\c" "\x41" "\u00e9" "/" [\]a/-] .', ['a"b\\cAé/]\n', 'a"b\\cAé/-🙂'], ['a"b\\cAé/b.']),
        ('root ::= "(" root ")" | ""', ["", "()", "((()))"], ["(", ")("]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a", "ab"]),
        ('root ::= ("ab" | "c"){2,3} "x"{2} "y"{1,} "z"{,1}', ["abcxxy", "cccxxyyz"], ["cxxy", "ccccxxy", "ccxxyzz"]),
        ("root ::= [^a]{2}", ["bc", "\n\n", "éé"], ["ab", "b"]),
        ('root ::= foo-bar fooBar 1a\nfoo-bar ::= "x" \nfooBar ::= "y"\n1a ::= "z"', ["xyz"], ["xy"]),
        ('root ::= "a"\n     | "b"   # or\n     | "c"\n', ["a", "b", "c"], ["ab"]),
        ("root ::= [ぁ-ゟ]+", ["あい"], ["a", "カ"]),
        ('root ::= start "a*b"\nstart ::= "%json" | "//"', ["%jsona*b", "//a*b"], ["aab"]),
    ],
)  # fmt: skip
def test_languages(source: str, yes: list[str], no: list[str]) -> None:
    assert [matches(source, text) for text in yes] == [True] * len(yes)
    assert [matches(source, text) for text in no] == [False] * len(no)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "a rule 'root', found none"),
        ('a ::= "x"', "a rule 'root', found none"),
        ("root ::= foo", "line 1: rule 'foo' is not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2: rule 'root' is defined twice"),
        ('root ::= "a', "closing quote or bracket"),
        ("root ::= [a", "closing quote or bracket"),
        ("root ::= []", r"a character in '\[\]'"),
        ("root ::= [z-a]", "rising"),
        ('root ::= ("a"', r"expected '\)'"),
        ('root ::= "a"{3,2}', "m at most n"),
        ('root ::= "a"{x}', "a repetition"),
        ('root ::= "a"{5000}', "at most 2000"),
        (r'root ::= "\q"', r"unknown escape '\\q'"),
        (r'root ::= "\ud800"', "unknown escape"),
        ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "100 nested"),
        ('root ::= "a" <think>', r"expected a rule \('name ::= …'\), found '<think>'"),
        ("nonsense", "expected a rule"),
    ],
)
def test_what_is_not_gbnf_is_told_with_its_line(source: str, said: str) -> None:
    with pytest.raises(GbnfError, match=said):
        gbnf_to_lark(source)
