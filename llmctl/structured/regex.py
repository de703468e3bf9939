"""Regular expressions as llguidance has them: Rust's syntax, the whole of a text."""

from __future__ import annotations

import re


def quoted(text: str) -> str:
    """An expression that matches this text alone; it may stand between Lark's slashes."""
    return re.sub(r"[^A-Za-z0-9_ ]", lambda match: f"\\x{{{ord(match[0]):X}}}", text)
