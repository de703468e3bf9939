"""Compiled kernels kept from build to build: a folder with one file an entry, checked whenever it is read.

An entry is three parts with a newline between them: the sha256 of its key and the other two, what describes the code
(JSON on one line), the code. An entry that lies under another's name is a damaged one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_entry(cache: Path | None, key: str) -> tuple[dict[str, Any], bytes] | None:
    """(fields, code) of an entry; None when it is absent or damaged, or there is no cache."""
    if cache is None:
        return None
    try:
        recorded, body = (cache / key).read_bytes().split(b"\n", 1)
        if recorded != _sha256(key, body):
            return None
        fields, code = body.split(b"\n", 1)
        described = json.loads(fields)
    except (OSError, ValueError):
        return None
    return (described, code) if isinstance(described, dict) else None


def write_entry(cache: Path | None, key: str, fields: Mapping[str, Any], code: bytes) -> None:
    """Keep an entry, atomically, in place of one of the same key. A cache that cannot be written is not an error.

    Args:
        fields: what JSON can hold.
    """
    if cache is None:
        return
    body = json.dumps(fields, sort_keys=True).encode() + b"\n" + code
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache, prefix=f".{key[:16]}-")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_sha256(key, body) + b"\n" + body)
        os.replace(name, cache / key)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _sha256(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + body).hexdigest().encode()
