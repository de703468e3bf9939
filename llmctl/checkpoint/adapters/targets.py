"""Which modules an adapter's settings name, by PEFT's rules, and the rank and alpha of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from llmctl.checkpoint.adapters.settings import ALL_LINEAR, AdapterSettings
from llmctl.checkpoint.hf_folder import ADAPTER_CONFIG
from llmctl.checkpoint.name_patterns import NameMatcher, check_patterns
from llmctl.errors import CheckpointError

T = TypeVar("T")
_PLAIN = re.compile(r"[\w.]+")


class Targets:
    """Asks settings about modules; all patterns of a file have to be matched within one limit of time.

    Raises:
        CheckpointError: a pattern that is no regular expression.
    """

    def __init__(self, folder: Path, settings: AdapterSettings) -> None:
        self._where = str(folder / ADAPTER_CONFIG)
        self._settings = settings
        self._matcher = NameMatcher()
        patterns = [p for p in (settings.targets, settings.excluded) if isinstance(p, str)]
        ends = [*settings.ranks, *settings.alphas]
        # `(?x)q # all` is one by itself, but takes in what stands behind it.
        entries = [*patterns, *ends, *(_at_the_end(p) for p in ends if not _PLAIN.fullmatch(p))]
        check_patterns([f"re:{p}" for p in entries], self._where)

    def names(self, module: str, *, linear: bool, head: bool) -> bool:
        """Whether LoRA acts on a module, called as in the model that the adapter was trained on.

        Args:
            linear: it is no table of embeddings. head: it is the output head, which ``all-linear`` leaves out.

        Raises:
            CheckpointError: patterns that take too long.
        """
        s = self._settings
        if self._among(module, s.excluded) or is_saved(module, s.saved):
            return False
        if isinstance(s.targets, str) and s.targets.lower() == ALL_LINEAR:
            return linear and not head
        if s.targets is None:
            return True
        if not self._among(module, s.targets):
            return False
        # As in PEFT, layers are counted only of modules that are named by their last part.
        if isinstance(s.targets, str) or s.layers is None or module in s.targets:
            return True
        return self._layer(module) in s.layers

    def rank(self, module: str) -> int:
        """The rank of a module; errors as ``names``."""
        return self._first(module, self._settings.ranks, self._settings.rank)

    def alpha(self, module: str) -> float:
        """The alpha of a module; errors as ``names``."""
        return self._first(module, self._settings.alphas, self._settings.alpha)

    def _among(self, module: str, named: tuple[str, ...] | str) -> bool:
        if isinstance(named, str):
            return self._matches(module, named)
        return module in named or any(module.endswith(f".{name}") for name in named)

    def _first(self, module: str, patterns: Mapping[str, T], otherwise: T) -> T:
        for pattern, value in patterns.items():
            # By far the most are names; compiling each for each module would take the time there is.
            if _PLAIN.fullmatch(pattern):
                found = f".{module}".endswith(f".{pattern}")
            else:
                found = self._matches(module, _at_the_end(pattern))
            if found:
                return value
        return otherwise

    def _layer(self, module: str) -> int | None:
        for name in self._settings.layer_names or (None,):
            lists = r"[^.]*" if name is None else re.escape(name)
            found = re.match(rf"(?:.*?\.)?{lists}\.(\d+)\.", module)
            if found is not None:
                return int(found[1])
        return None

    def _matches(self, module: str, pattern: str) -> bool:
        try:
            return self._matcher.matches([module], f"re:{pattern}", whole=True)
        except ValueError as error:
            raise CheckpointError(f"{self._where}: {error}") from error


def _at_the_end(pattern: str) -> str:
    """Matches all of a module's name where a pattern matches its last parts."""
    return rf"(?:.*\.)?(?:{pattern})"


def is_saved(module: str, saved: Iterable[str]) -> bool:
    """Whether a module, or one that it is in, was trained whole: PEFT looks at how their names end."""
    parts = module.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(name.endswith(entry) for name in above for entry in saved)
