"""The text that models are measured on unless another is given, and how another is read."""

from __future__ import annotations

from pathlib import Path

from llmctl.errors import UsageError

_BUILTIN = Path(__file__).parent / "eval_text.txt"  # Herman Melville, Moby-Dick (1851), from chapter 1


def read_text(name: str, option: str = "eval_text", *, optional: bool = True) -> str | None:
    """The text that an option names: a file, ``builtin``, or ``none`` (None).

    Args:
        option: its name. optional: whether it may be ``none``.

    Raises:
        UsageError: a file that cannot be read as text.
    """
    if optional and name == "none":
        return None
    path = _BUILTIN if name == "builtin" else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fix = "name a text file, builtin or none" if optional else "name a text file, or builtin"
        raise UsageError(f"--{option.replace('_', '-')} {name}: {reason}", fix=fix, param=option) from error
