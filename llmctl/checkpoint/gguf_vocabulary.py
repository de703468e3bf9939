"""The tables of a GGUF file's tokenizer: tokens, their kinds, which of them have a role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.gguf_header import shown
from llmctl.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""``tokenizer.ggml.token_type``: sentencepiece's kinds of pieces."""
SPECIAL = (UNKNOWN, CONTROL)
"""What stands for no text of its own."""


class Vocabulary:
    """``tokenizer.ggml.*`` of one file, checked.

    Attributes:
        tokens: by id.
        types: by id, of ``NORMAL`` to ``BYTE``.
        where: the file, for messages.
    """

    def __init__(self, metadata: Mapping[str, Any], where: str, roles: Mapping[str, int] | None = None) -> None:
        """Check the tables.

        Args:
            roles: ids of roles ("bos", "eos", …) that the file does not name.

        Raises:
            CheckpointError: damaged tables.
        """
        self._metadata, self.where, self._roles = metadata, where, roles or {}
        self.tokens = self.strings("tokens")
        self.types = self._types()
        if len(set(self.tokens)) != len(self.tokens):
            raise CheckpointError(f"{where}: a token occurs twice in tokenizer.ggml.tokens")
        if len(self.types) != len(self.tokens):
            raise CheckpointError(f"{where}: {len(self.tokens)} tokens but {len(self.types)} token types")

    def strings(self, key: str) -> list[str]:
        """A list of strings that must be there."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not value:
            raise CheckpointError(f"{self.where}: metadata tokenizer.ggml.{key}: expected a list of strings")
        return value

    def numbers(self, key: str, kinds: str, expected: str) -> NDArray[Any] | None:
        """An array of numpy's ``kinds`` ("iu", "f"), or None."""
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if found is not None and (not isinstance(found, np.ndarray) or found.dtype.kind not in kinds):
            raise CheckpointError(f"{self.where}: metadata tokenizer.ggml.{key}: expected a list of {expected}")
        return found

    def _types(self) -> list[int]:
        found = self.numbers("token_type", "iu", "integers")
        return [NORMAL] * len(self.tokens) if found is None else [int(kind) for kind in found]

    def id(self, role: str) -> int | None:
        """The token with a role ("bos", "eos", "eot", "unknown", …); None where it names none of the vocabulary."""
        token = self._metadata.get(f"tokenizer.ggml.{role}_token_id", self._roles.get(role))
        if token is None:
            return None
        if type(token) is not int:
            raise CheckpointError(
                f"{self.where}: metadata tokenizer.ggml.{role}_token_id: expected an integer, found {shown(token)}"
            )
        return token if 0 <= token < len(self.tokens) else None

    def text(self, role: str) -> str | None:
        """That token's text."""
        token = self.id(role)
        return None if token is None else self.tokens[token]

    def flag(self, key: str, default: bool) -> bool:
        """A setting that is true or false."""
        wanted = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(wanted, bool):
            raise CheckpointError(
                f"{self.where}: metadata tokenizer.ggml.{key}: expected true or false, found {shown(wanted)}"
            )
        return wanted

    def adds(self, role: str, default: bool) -> bool:
        """Whether every text gets the token with a role."""
        return self.flag(f"add_{role}_token", default) and self.id(role) is not None

    def added_tokens(self) -> list[dict[str, Any]]:
        """tokenizer.json's ``added_tokens``: what is looked for in a text before anything else."""
        return [
            {
                "id": i,
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind in SPECIAL,
            }
            for i, kind in enumerate(self.types)
            if kind in SPECIAL or kind == USER_DEFINED
        ]
