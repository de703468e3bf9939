"""Reasoning, which is free, before an answer that is held to a grammar: rules of Lark, and where reasoning stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmctl.structured.regex import quoted
from llmctl.structured.spec import ANSWER, GrammarSpec
from llmctl.text.output_parser.formats import ReasoningFormat

BLANKS = r"[\s\x{1C}-\x{1F}]*"  # what the parser takes for white space
# Between the reasoning and an answer, as models write it; the parser drops it.
_GAP = r"( |\n{1,2})"


def opening_rules(
    name: str, expression: str, marker: str, before: str, special_ids: Mapping[str, int]
) -> tuple[str, str]:
    """Rules of what ends with a marker, spelt out or as a special token after the terminal ``before``. A lazy rule ends
    where it first matches, and nothing else that might match on does: so no text goes on over a marker that may come
    there."""
    special = special_ids.get(marker)
    as_token = f" | {before}? <[{special}]>" if special is not None else ""
    return f"{name}_spelt[lazy]: {expression}", f"{name}: {name}_spelt{as_token}"


def thinking_rules(
    row: ReasoningFormat, special_ids: Mapping[str, int], after: str, *, alone: bool = False
) -> tuple[str, ...]:
    """Rules of which ``thinking`` is reasoning that has begun, and what comes after it.

    Args:
        special_ids: of the special tokens that markers are made of, by their texts; all but the end may come in it.
        after: rules of what comes after it. alone: nothing need come.
    """
    markers = ",".join(str(i) for text, i in special_ids.items() if text != row.end)
    whole = f"thought thought_end {after}"
    return (
        "THOUGHT: /(?s:.+)/",
        f"thought: (THOUGHT | <[{markers}]>)*" if markers else "thought: THOUGHT?",
        *opening_rules("thought_end", f"/(?s:.*){quoted(row.end)}/", row.end, "THOUGHT", special_ids),
        f"thinking: {whole} | thought" if alone else f"thinking: {whole}",
    )


def after_thinking(
    spec: GrammarSpec, row: ReasoningFormat, special_ids: Mapping[str, int], *, begun: bool, opener: int | None
) -> GrammarSpec:
    """The grammar of an answer with reasoning before it: that is free, and must end before the answer begins.

    Args:
        special_ids: as of ``thinking_rules``. begun: it has begun before the output.
        opener: the token that begins it otherwise; None: then there is none. Not the marker in any other spelling: its
            first token may begin what the model would rather write than the answer, ``<`` a ``<tool_call>``.
    """
    if not begun and opener is None:
        return spec
    start = "thinking" if begun else f"<[{opener}]> thinking | @{ANSWER}"
    rules = (f"start: {start}", *thinking_rules(row, special_ids, f"GAP? @{ANSWER}"), f"GAP: /{_GAP}/")
    return replace(spec, before="".join(f"{rule}\n" for rule in rules))


def standing(row: ReasoningFormat, prompt: str, continued: str | None) -> tuple[bool, bool]:
    """Whether the answer's reasoning has begun before the answer, and whether it is over.

    Args:
        prompt: as it was rendered. continued: the text of its last message, which the answer goes on with; None: the
            answer is a message of its own.
    """
    if continued is not None:
        begun = continued.rfind(row.begin) > continued.rfind(row.end)
        return begun, not begun
    text = prompt.rstrip()
    return text.endswith(row.begin), text.endswith(row.end)
