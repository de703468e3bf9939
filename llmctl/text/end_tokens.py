"""Which tokens end a generation, read from a tokenizer's files without making the tokenizer, which takes ten times as
long: an engine needs to know no more of it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from llmctl.text.tokenizer_files import files_of, generation_eos, json_of, special_tokens_of


class _Added(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _Stored(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []


_decode = msgspec.json.Decoder(_Stored).decode


def end_token_ids(folder: Path) -> frozenset[int]:
    """As ``Tokenizer.from_folder(folder).eos_token_ids``.

    Raises:
        CheckpointError: a file that is needed for it is damaged.
    """
    where, files = str(folder), files_of(folder)
    special = special_tokens_of(
        {**json_of(files, "special_tokens_map.json", where), **json_of(files, "tokenizer_config.json", where)}
    )
    named = generation_eos(json_of(files, "generation_config.json", where), where)
    eos = special.get("eos_token")
    if not eos:
        return named
    found = _id_of(eos, folder / "tokenizer.json")
    return _read_whole(folder) if found is None else named | {found}


def _id_of(token: str, file: Path) -> int | None:
    """The id of a token; None where only the tokenizers library can tell."""
    try:
        stored = _decode(file.read_bytes())
    except (OSError, ValueError, RecursionError):  # a vocabulary that is a list, a file that is none
        return None
    vocab, added = stored.model.vocab, stored.added_tokens
    if token in vocab:
        return vocab[token]
    # The library numbers those that the vocabulary has not itself, behind it and each once, whatever a file says.
    new = [each for each in added if each.content not in vocab]
    if [each.id for each in new] != list(range(len(vocab), len(vocab) + len(new))) or any(not e.content for e in new):
        return None
    if len({each.content for each in new}) < len(new):
        return None
    return next((each.id for each in new if each.content == token), None)


def _read_whole(folder: Path) -> frozenset[int]:
    from llmctl.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder).eos_token_ids
