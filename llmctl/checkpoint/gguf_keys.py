"""Typed look-ups of what a GGUF file says of its architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmctl.checkpoint.gguf_header import shown
from llmctl.errors import CheckpointError


class Keys:
    """``<arch>.<key>`` of one file's metadata."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, where: str) -> None:
        self.metadata, self.arch, self.where = metadata, arch, where

    def get(self, key: str) -> Any:
        """A value as it is stored; None when there is none."""
        return self.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            CheckpointError: something else, or nothing and no default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value <= 0:
            found = "none" if value is None else shown(value)
            raise CheckpointError(
                f"{self.where}: metadata {self.arch}.{key}: expected a positive integer, found {found}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, the shortest decimal of its float32.

        Raises:
            CheckpointError: something else, or nothing and no default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{self.where}: metadata {self.arch}.{key}: expected a positive number, found {shown(value)}"
            )
        return float(str(np.float32(value)))  # the shortest decimal: 1e-05, not 9.999999747378752e-06


def is_set(value: Any) -> bool:
    """Whether a metadata value asks for something: an array does, a number does unless it is 0."""
    return value is not None and (isinstance(value, np.ndarray) or bool(value))
