"""A Hugging Face tokenizer as a GGUF file's ``tokenizer.ggml.*``; the other way round is ``gguf_tokenizer.py``.

Byte-level BPE, and BPE over characters with bytes to fall back on, which is sentencepiece's. Of a byte-level one's
pre-tokenizer GGUF has the name alone: that of the first known one whose stages are the tokenizer's own. What was made
is read back and takes the same texts to the same ids, and these to the same texts, or is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as Backend

from llmctl.checkpoint import gguf_spm_metadata as spm
from llmctl.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from llmctl.checkpoint.gguf_tokenizer import end_ids, synthesise_aux_files
from llmctl.checkpoint.gguf_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED
from llmctl.errors import CheckpointError, UnsupportedModelError, UsageError
from llmctl.text.tokenizer import Tokenizer

Made = TypeVar("Made")
_SPECIAL = {"bos": "bos_token", "padding": "pad_token", "unknown": "unk_token"}
_ENDS = ("eos", "eot", "eom")
_SAMPLING = {
    **{"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"},
    "repetition_penalty": "penalty_repeat",
}
_BPE = {"dropout": (None, 0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
_TEXTS = (
    "Hello, world! It's 2024-01-31; we'd pay $1,234.56 -- won't we?",
    " leading and  double   spaces\ttabs\n\nlines \r\n end ",
    "def f(x):\n    return x**2 + 1  # x\u00b2",
    "Gr\u00fc\u00dfe, \u4f60\u597d\u4e16\u754c, \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, "
    "\u0645\u0631\u062d\u0628\u0627, e\u0301 \u1e9b\u0323 \ufb01 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "UPPER lower'S I'LL 12345678 a1b2c3 _x__y \u0661\u0662\u0663",
    "",
)


def tokenizer_metadata(files: Mapping[str, Path | bytes], rows: int, where: str) -> dict[str, Any]:
    """``tokenizer.*`` and ``general.sampling.*``.

    Args:
        files: the tokenizer's files by name, as ``Checkpoint.aux_files`` gives them.
        rows: of the embedding; ids without a token are filled up.
        where: the checkpoint, for messages.

    Raises:
        UsageError: a tokenizer that GGUF's keys do not express; what it is, is said.
        CheckpointError: no tokenizer, or a damaged one.
    """
    tokenizer = Tokenizer.from_files(files, where=where)
    document, backend = _document(files), Backend.from_str(_text(files["tokenizer.json"]))
    vocabulary = _vocabulary(document, backend, rows)
    is_spm = bool(document["model"].get("byte_fallback"))
    metadata: dict[str, Any] = {
        **(_spm_tables if is_spm else _byte_level_tables)(document, vocabulary),
        **_special_ids(tokenizer, backend),
        **_sampling(files),
    }
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template.source
    metadata |= _ends(tokenizer, metadata, where)
    made = _read_back(metadata, where)
    if is_spm:
        read = [(left, right) for left, right in _document(made)["model"]["merges"]]
        try:
            spm.check_same_merges(spm.live_merges(document), read)
        except UnsupportedModelError as error:
            raise _refused(error.message) from error
    _check_same(tokenizer, backend, Tokenizer.from_files(made, where=where))
    return metadata


def _tables(kind: str, pre: str, vocabulary: list[tuple[str, int]]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [kind for _, kind in vocabulary],
    }


def _byte_level_tables(document: Mapping[str, Any], vocabulary: list[tuple[str, int]]) -> dict[str, Any]:
    tables = _tables("gpt2", _pre_tokenizer(document), vocabulary)
    return {**tables, "tokenizer.ggml.merges": _merges(document)}


def _spm_tables(document: Mapping[str, Any], vocabulary: list[tuple[str, int]]) -> dict[str, Any]:
    *stages, ignores_merges = _stages(document)
    if ignores_merges:
        raise _refused("its BPE has ignore_merges True")
    try:
        prefix = spm.has_prefix(stages)
    except UnsupportedModelError as error:
        raise _refused(error.message) from error
    tables = _tables("llama", "default", spm.spm_kinds(vocabulary, document["model"].get("unk_token")))
    return {
        **tables,
        "tokenizer.ggml.scores": spm.scores(spm.live_merges(document), tables["tokenizer.ggml.tokens"]),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _refused(what: str) -> UsageError:
    return UsageError(
        f"GGUF is not written for this tokenizer: {what}", fix="write another format, which keeps it", param="format"
    )


def _text(source: Path | bytes) -> str:
    return (source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8")


def _document(files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """tokenizer.json, of a BPE."""
    document: dict[str, Any] = json.loads(_text(files["tokenizer.json"]))
    model = document.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"its model is {model['type']}, not BPE")
    odd = next((key for key, known in _BPE.items() if model.get(key) not in known), None)
    if odd is not None:
        raise _refused(f"its BPE has {odd} {model[odd]!r}")
    return document


def _merges(document: Mapping[str, Any]) -> list[str]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    odd = next((merge for merge in merges if merge.count(" ") != 1), None)
    if odd is not None or not merges:
        raise _refused("it has no merges" if odd is None else f"a merge of tokens with spaces: {odd!r}")
    return merges


def _vocabulary(document: Mapping[str, Any], backend: Backend, rows: int) -> list[tuple[str, int]]:
    """Token and type by id, one for every row of the embedding."""
    added = backend.get_added_tokens_decoder()
    tokens = {i: (token, NORMAL) for token, i in document["model"]["vocab"].items()}
    tokens |= {i: (token.content, CONTROL if token.special else USER_DEFINED) for i, token in added.items()}
    last = max(tokens)
    if last >= rows:
        raise _refused(f"token {tokens[last][0]!r} has id {last}, and the embedding has {rows} rows")
    return [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]


def _stages(document: Mapping[str, Any]) -> list[Any]:
    """What happens to a text before BPE, as values that compare equal where they do the same."""

    def flat(stage: Any, inner: str) -> Iterator[Any]:
        if stage is None:
            return
        if stage["type"] == "Sequence":
            for one in stage[inner]:
                yield from flat(one, inner)
        else:
            yield {key: value for key, value in stage.items() if key != "trim_offsets"}

    return [
        *flat(document.get("normalizer"), "normalizers"),
        *flat(document.get("pre_tokenizer"), "pretokenizers"),
        bool(document["model"].get("ignore_merges")),
    ]


def _pre_tokenizer(document: Mapping[str, Any]) -> str:
    """llama.cpp's name of the tokenizer's pre-tokenizer."""
    wanted = _stages(document)
    tiny = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    for name in PRE_TOKENIZERS:
        made = synthesise_aux_files({**tiny, "tokenizer.ggml.pre": name}, name)["tokenizer.json"]
        if _stages(json.loads(made)) == wanted:
            return name
    kinds = ", ".join(stage["type"] for stage in wanted[:-1]) or "nothing"
    raise _refused(f"its stages before BPE ({kinds}) are no pre-tokenizer that is known (docs/formats.md)")


def _special_ids(tokenizer: Tokenizer, backend: Backend) -> dict[str, Any]:
    """Ids of BOS, padding and unknown, and whether BOS and EOS are put around a text."""
    named = {key: tokenizer.special_tokens.get(name) for key, name in _SPECIAL.items()}
    found: dict[str, Any] = {
        f"tokenizer.ggml.{key}_token_id": backend.token_to_id(text)
        for key, text in named.items()
        if text is not None and backend.token_to_id(text) is not None
    }
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if start is None or not plain:
        raise _refused("its post-processor changes the text's tokens")
    around = {"bos": whole[:start], "eos": whole[start + len(plain) :]}
    for key, ids in around.items():
        text = tokenizer.special_tokens.get(f"{key}_token")
        if ids and (text is None or ids != [backend.token_to_id(text)]):
            raise _refused(f"its post-processor adds {ids} where its {key.upper()} token would be")
        found[f"tokenizer.ggml.add_{key}_token"] = bool(ids)
    return found


def _ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Ids that end a generation: the tokenizer's EOS first, then those that a reader does not know by their text."""
    own = None if tokenizer.eos_token is None else metadata["tokenizer.ggml.tokens"].index(tokenizer.eos_token)
    ends = sorted(tokenizer.eos_token_ids, key=lambda i: (i != own, i))
    found = {f"tokenizer.ggml.{_ENDS[0]}_token_id": i for i in ends[:1]}
    known = _understood(end_ids, {**metadata, **found}, where)
    rest = [i for i in ends[1:] if i not in known]
    if len(rest) > len(_ENDS) - 1:
        raise _refused(f"{len(ends)} tokens end a generation: {ends}; GGUF has keys for {len(_ENDS)}")
    return {**found, **{f"tokenizer.ggml.{key}_token_id": i for key, i in zip(_ENDS[1:], rest, strict=False)}}


def _sampling(files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """What generation_config.json recommends for sampling, where it does."""
    stored = json.loads(_text(files["generation_config.json"])) if "generation_config.json" in files else {}
    if not stored.get("do_sample", True):
        return {}
    given = {theirs: stored.get(ours) for ours, theirs in _SAMPLING.items()}
    whole = {"top_k"}
    return {
        f"general.sampling.{key}": int(value) if key in whole else float(value)
        for key, value in given.items()
        if isinstance(value, int | float)
    }


def _read_back(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """The tokenizer's files, as a reader makes them of the metadata."""
    return _understood(synthesise_aux_files, metadata, where)


def _understood(read: Callable[[Mapping[str, Any], str], Made], metadata: Mapping[str, Any], where: str) -> Made:
    import numpy as np

    arrays = {"token_type": np.int32, "scores": np.float32}
    kept = {f"tokenizer.ggml.{key}": dtype for key, dtype in arrays.items()}
    try:
        return read({k: np.array(v, kept[k]) if k in kept else v for k, v in metadata.items()}, where)
    except (CheckpointError, UnsupportedModelError) as error:
        raise _refused(error.message) from error


def _check_same(tokenizer: Tokenizer, backend: Backend, made: Tokenizer) -> None:
    """Refuse what a reader of the metadata would tokenize, or write out, otherwise."""
    if tokenizer.bos_token != made.bos_token:
        raise _refused(f"its BOS token is {tokenizer.bos_token}, and readers would take {made.bos_token!r} for it")
    if made.eos_token_ids and not tokenizer.eos_token_ids:
        raise _refused(f"no token ends a generation, and readers would take {made.eos_token!r} to end one")
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    for text in [*_TEXTS, *(f"x {token} y{token}z" for token in added)]:
        ids = tokenizer.encode(text)
        if ids != made.encode(text):
            raise _refused(f"{text!r} would be tokenized otherwise")
        if tokenizer.decode(ids) != made.decode(ids):
            raise _refused(f"the tokens of {text!r} would be written out otherwise")
