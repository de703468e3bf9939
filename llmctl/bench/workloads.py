"""What is asked: random words of an exact token length, lines of a file, or ShareGPT conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.errors import UsageError

TokenCounter = Callable[[Sequence[str]], list[int]]
"""Token counts of texts, as the server will count a prompt (special tokens included)."""

DATASETS = ("random", "file", "sharegpt")
_FIT_ROUNDS = 64
_SHORT_WORDS = ["a", "I", "it", "to", "of", "in", "we", "so"]

WORDS = (
    "apple river stone cloud garden winter summer market bridge forest window mountain paper music doctor engine "
    "table silver yellow orange purple green simple quiet strong heavy early open close north south east west road "
    "train horse island ocean beach desert valley castle village city street house door floor wall roof kitchen "
    "bread milk sugar salt water fire earth wind rain snow light dark morning evening night week month year hour "
    "minute second number letter word story book page line picture color sound voice song dance game ball team "
    "player coach school teacher student class lesson question answer problem reason result change power force "
    "energy matter space planet star moon sun animal bird fish tree flower grass leaf seed fruit farm field "
    "farmer worker driver writer artist king queen child mother father sister brother friend family people person "
    "body head face hand foot heart mind life health food drink money price trade shop bank office company law "
    "court police army war peace history science nature country world land state nation party vote leader member "
    "group meeting plan project idea point view fact case example system process method model design test data "
    "value level rate cost size weight length height depth speed time place area region center corner edge side top"
).split()


@dataclass(frozen=True)
class WorkItem:
    """One request to send: a prompt, or chat messages, and the output tokens to ask for.

    ``input_tokens`` is the prompt's length; ``exact`` says that it was counted, and is the length wanted.
    """

    prompt: str
    input_tokens: int
    output_tokens: int
    exact: bool = False
    messages: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class LengthRange:
    """Inclusive range of lengths in tokens."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str | int, param: str) -> LengthRange:
        """``128`` or ``32-256``.

        Raises:
            UsageError: not that, or not 1 <= low <= high.
        """
        low, dash, high = str(text).strip().partition("-")
        try:
            parsed = cls(int(low), int(high) if dash else int(low))
        except ValueError:
            parsed = cls(0, 0)
        if not 1 <= parsed.low <= parsed.high:
            option = "--" + param.replace("_", "-")
            raise UsageError(f"{option} '{text}': expected tokens such as 128, or a range such as 32-256", param=param)
        return parsed

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """``count`` lengths, uniform over the range."""
        return [int(n) for n in rng.integers(self.low, self.high + 1, size=count)]

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class SharedPrefixes:
    """Beginnings that prompts share, as system prompts are: ``count`` different ones of ``tokens`` tokens."""

    tokens: int
    count: int = 1


def random_items(
    count: int,
    inputs: LengthRange,
    outputs: LengthRange,
    *,
    seed: int,
    stream: int,
    counter: TokenCounter | None,
    prefixes: SharedPrefixes | None = None,
) -> list[WorkItem]:
    """Prompts of random words, all different from each other and from those of any other ``stream``.

    Lengths depend on ``seed`` alone, so that repeats (one stream each) do the same amount of work with other words,
    and no prefix cache helps. Without a ``counter`` a word is taken to be a token.

    Args:
        prefixes: what prompts begin with, in turns, before words of their own; ``inputs`` is the length of those, as
            for ``vllm bench serve --random-prefix-len``. Another stream has other prefixes.
    """
    lengths_rng = np.random.default_rng([seed, 1])
    input_lens, output_lens = inputs.draw(lengths_rng, count), outputs.draw(lengths_rng, count)
    rng = np.random.default_rng([seed, 2, stream])
    if prefixes is not None:
        texts, sizes = fit_prompts(
            [prefixes.tokens] * prefixes.count, np.random.default_rng([seed, 5, stream]), counter
        )
        heads = [(texts[i % prefixes.count], sizes[i % prefixes.count]) for i in range(count)]
        prompts, found = fit_prompts(input_lens, rng, counter, heads)
        input_lens = [size + own for (_, size), own in zip(heads, input_lens, strict=True)]
    else:
        prompts, found = fit_prompts(input_lens, rng, counter)
    return [
        WorkItem(prompt, n, out, exact=counter is not None and n == wanted)
        for prompt, n, wanted, out in zip(prompts, found, input_lens, output_lens, strict=True)
    ]


def fit_prompts(
    lengths: Sequence[int],
    rng: np.random.Generator,
    counter: TokenCounter | None,
    heads: Sequence[tuple[str, int]] | None = None,
) -> tuple[list[str], list[int]]:
    """Word prompts of the wanted token lengths, and the lengths they have.

    Words are added or dropped until the count fits; a prompt that never fits (a tokenizer that cannot say so short a
    text) keeps its true count.

    Args:
        heads: a text that each begins with, and its tokens, which are not of ``lengths`` but of the lengths found.
    """
    words = [[WORDS[i] for i in rng.integers(0, len(WORDS), size=n)] for n in lengths]
    before = [size for _, size in heads] if heads is not None else [0] * len(lengths)

    def text(index: int) -> str:
        own = " ".join(words[index])
        return own if heads is None else f"{heads[index][0]} {own}"

    counts = list(lengths)
    pending = list(range(len(lengths))) if counter is not None else []
    for last in [*[False] * _FIT_ROUNDS, True]:
        if counter is None or not pending:
            break
        for index, count in zip(pending, counter([text(i) for i in pending]), strict=True):
            counts[index] = count - before[index]
        pending = [i for i in pending if counts[i] != lengths[i]]
        for i in () if last else pending:
            words[i] = _resize(words[i], lengths[i], counts[i], rng)
    return [text(i) for i in range(len(lengths))], [own + head for own, head in zip(counts, before, strict=True)]


def _resize(words: list[str], wanted: int, count: int, rng: np.random.Generator) -> list[str]:
    """Words nearer to the wanted token count: whole words by the tokens a word has so far, then trying other words."""
    change = round((wanted - count) * len(words) / max(1, count))
    if abs(change) == 1 and rng.random() < 0.5:
        # Adding a word and dropping it again for ever is the trap here.
        change = 0
    if change > 0:
        return words + [WORDS[i] for i in rng.integers(0, len(WORDS), size=change)]
    if change < 0:
        return words[: max(1, len(words) + change)]
    if count < wanted and rng.random() < 0.5:
        return [*words, _SHORT_WORDS[int(rng.integers(0, len(_SHORT_WORDS)))]]
    place = int(rng.integers(len(words) // 2, len(words)))
    pool = WORDS if rng.random() < 0.5 else _SHORT_WORDS
    return [*words[:place], pool[int(rng.integers(0, len(pool)))], *words[place + 1 :]]


def file_items(
    path: Path, count: int, outputs: LengthRange, *, seed: int, counter: TokenCounter | None
) -> list[WorkItem]:
    """Prompts of a .txt (one a line) or .jsonl file, in file order, from the start again when too few.

    A JSON line has ``prompt`` or ``text`` or ``messages``, and may have ``output_len`` (or ``max_tokens``), which
    wins over ``outputs``.

    Raises:
        UsageError: unreadable, empty, or a line that is none of these.
    """
    rows = list(_read_rows(path))
    if not rows:
        raise UsageError(f"--dataset-path {path}: no prompts in it", param="dataset_path")
    lengths = outputs.draw(np.random.default_rng([seed, 3]), count)
    return _count_tokens([_row_item(path, rows[i % len(rows)], lengths[i]) for i in range(count)], counter)


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    text = _read_text(path)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--dataset-path {path}:{number}: not JSON: {error}", param="dataset_path") from error
        if not isinstance(row, dict):
            raise UsageError(f"--dataset-path {path}:{number}: expected an object, found {type(row).__name__}")
        yield {**row, "_line": number}


def _row_item(path: Path, row: dict[str, Any], output_len: int) -> WorkItem:
    place = f"--dataset-path {path}:{row.get('_line', '?')}"
    wanted = row.get("output_len", row.get("max_tokens", output_len))
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise UsageError(f"{place}: output_len: expected a positive integer, found {wanted!r}", param="dataset_path")
    messages = row.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise UsageError(f"{place}: messages: expected a list of objects", param="dataset_path")
        text = "\n".join(str(m.get("content") or "") for m in messages)
        return WorkItem(text, len(text.split()), wanted, messages=tuple(messages))
    prompt = row.get("prompt", row.get("text"))
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f"{place}: expected 'prompt' (text) or 'messages'", param="dataset_path")
    return WorkItem(prompt, len(prompt.split()), wanted)


def sharegpt_items(
    path: Path, count: int, outputs: LengthRange | None, *, seed: int, counter: TokenCounter | None
) -> list[WorkItem]:
    """First human turns of ShareGPT conversations (a JSON list, or JSON lines), in an order drawn from ``seed``.

    Without ``outputs`` the length of the answer in the data is asked for.

    Raises:
        UsageError: unreadable, or no conversation of two turns in it.
    """
    pairs = [pair for row in _conversations(path) if (pair := _first_turns(row)) is not None]
    if not pairs:
        raise UsageError(f"--dataset-path {path}: no conversation of two turns in it", param="dataset_path")
    rng = np.random.default_rng([seed, 4])
    order = [int(i) for i in rng.permutation(len(pairs))]
    chosen = [pairs[order[i % len(order)]] for i in range(count)]
    if outputs is not None:
        lengths = outputs.draw(rng, count)
    else:
        answers = [answer for _, answer in chosen]
        lengths = counter(answers) if counter else [len(a.split()) for a in answers]
    items = [WorkItem(p, len(p.split()), max(1, n)) for (p, _), n in zip(chosen, lengths, strict=True)]
    return _count_tokens(items, counter)


def _conversations(path: Path) -> list[Any]:
    text = _read_text(path)
    try:
        if text.lstrip().startswith("["):
            loaded: list[Any] = json.loads(text)
            return loaded
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UsageError(f"--dataset-path {path}: not JSON: {error}", param="dataset_path") from error


def _first_turns(row: Any) -> tuple[str, str] | None:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    if not all(isinstance(text, str) and text for text in texts):
        return None
    return str(texts[0]), str(texts[1])


def _count_tokens(items: list[WorkItem], counter: TokenCounter | None) -> list[WorkItem]:
    if counter is None:
        return items
    counts = counter([item.prompt for item in items])
    return [
        WorkItem(item.prompt, n, item.output_tokens, item.messages is None, item.messages)
        for item, n in zip(items, counts, strict=True)
    ]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--dataset-path {path}: {reason}", param="dataset_path") from error
