"""A model's tokenizer, from its folder: text to token ids and back, special tokens, chat template.

Built on ``tokenizers`` alone. Reads ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``,
``generation_config.json`` and ``chat_template.jinja``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as _Backend

from llmctl.errors import CheckpointError, RequestError
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.text_bounds import TextBounds
from llmctl.text.token_bytes import TokenBytes
from llmctl.text.tokenizer_files import (
    files_of,
    generation_eos,
    json_of,
    line_of,
    special_tokens_of,
    text_of,
)

# tokenizers holds Python's lock in `encode` and `decode`, and lets it go in their batch forms: worth it for large ones.
_BATCH_CHARS = 4096
_BATCH_TOKENS = 1024


class Tokenizer:
    """Text <-> token ids of one model. Make one with ``from_folder`` or ``from_files``.

    Attributes:
        special_tokens: those of bos_token, eos_token, … that the model names, as text.
        bos_token, eos_token: shorthands for two of them; None when the model has none.
        eos_token_ids: ids that end a generation: generation_config's eos_token_id and the tokenizer's eos_token.
        chat_template: the default chat template; None when the model has none.
        config: ``tokenizer_config.json`` as it is; empty when there is none.
    """

    def __init__(
        self,
        backend: _Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        chat_template: ChatTemplate | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        own_eos = backend.token_to_id(self.eos_token) if self.eos_token else None
        self.eos_token_ids = eos_token_ids if own_eos is None else eos_token_ids | {own_eos}
        self.chat_template = chat_template
        self.config = dict(config or {})
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes = TokenBytes(backend)

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """The tokenizer of a checkpoint or engine folder.

        Raises:
            CheckpointError: no ``tokenizer.json``, or a damaged file (its name is given).
        """
        return cls.from_files(files_of(Path(path)), where=str(path))

    @classmethod
    def from_files(cls, files: Mapping[str, Path | bytes], *, where: str = "the checkpoint") -> Tokenizer:
        """The tokenizer made of files given by name, as paths or contents. ``where`` names them in errors.

        Raises:
            CheckpointError: as ``from_folder``.
        """
        if "tokenizer.json" not in files:
            raise CheckpointError(
                f"{where}: no tokenizer.json",
                fix="copy the model's tokenizer.json there, or save its tokenizer with transformers' save_pretrained",
            )
        try:
            backend = _Backend.from_str(text_of(files, "tokenizer.json", where))
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for whatever its parser dislikes
            raise CheckpointError(f"{where}: tokenizer.json is not understood: {line_of(error)}") from error
        config = json_of(files, "tokenizer_config.json", where)
        special = special_tokens_of({**json_of(files, "special_tokens_map.json", where), **config})
        return cls(
            backend,
            special_tokens=special,
            eos_token_ids=generation_eos(json_of(files, "generation_config.json", where), where),
            chat_template=_chat_template(files, config, special, where),
            config=config,
        )

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included (a model's embedding may be padded beyond)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def bounds(self) -> TextBounds:
        """What is known of a text's length in tokens without tokenizing it. The first time reads the vocabulary."""
        return TextBounds(self._backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the model's own leading and trailing special tokens unless told otherwise.

        A text beyond a few KB is tokenized without Python's lock: other threads run meanwhile.

        Raises:
            RequestError: text that is not valid Unicode (half of a surrogate pair, which JSON can spell).
        """
        return self._encoding(text, add_special_tokens).ids

    def encode_each(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """As ``encode`` of every text, all of them without Python's lock.

        Raises:
            RequestError: as ``encode``.
        """
        for text in texts:
            _check_unicode(text)
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def encode_up_to(self, most: int, text: str, add_special_tokens: bool = True) -> list[int] | int:
        """As ``encode``; of a text of more than ``most`` tokens their number only.

        Raises:
            RequestError: as ``encode``.
        """
        encoding = self._encoding(text, add_special_tokens)
        return encoding.ids if len(encoding) <= most else len(encoding)

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        _check_unicode(text)
        if len(text) <= _BATCH_CHARS:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, many of them without Python's lock. Ids that the tokenizer does not know yield nothing.

        Raises:
            RequestError: a number that can be no token id.
        """
        try:
            if len(ids) <= _BATCH_TOKENS:
                return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
            return self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
        except OverflowError as error:
            bad = next(i for i in ids if not 0 <= i < 2**32)
            raise RequestError(f"tokens: {bad} is not a token id", param="tokens") from error

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token; None when there is no such id."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry; None when there is none."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text that has begun already; b"" for an unknown id."""
        return self._bytes.middle(token_id)

    def token_text(self, token_id: int) -> str | None:
        """``token_bytes`` as text; None where they do not begin and end with a character."""
        return self._bytes.text(token_id)

    def first_token_bytes(self, token_id: int) -> bytes:
        """The bytes a token yields as the first of a text (some tokenizers drop its leading space)."""
        return self._bytes.first(token_id)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"text: not valid Unicode at character {error.start}") from error


def _chat_template(
    files: Mapping[str, Path | bytes], config: Mapping[str, Any], special: Mapping[str, str], where: str
) -> ChatTemplate | None:
    """``chat_template.jinja`` wins over tokenizer_config's; of a list of named templates, ``default`` is taken."""
    if "chat_template.jinja" in files:
        return ChatTemplate(text_of(files, "chat_template.jinja", where), special)
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
        if source is None:
            names = ", ".join(sorted(str(n) for n in named)) or "none"
            raise CheckpointError(f"{where}: tokenizer_config.json: no chat template named 'default' (found: {names})")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(
            f"{where}: tokenizer_config.json: chat_template: expected text, found {type(source).__name__}"
        )
    return ChatTemplate(source, special)
