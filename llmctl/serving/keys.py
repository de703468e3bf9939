"""The API keys of a server, held as sha256 digests: those of options, and those of a file that can be read again.

An unsalted sha256 is enough for keys that are random (``openssl rand -hex 32``): nobody can try them all, and no two
servers share one. It is none for passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from llmctl.errors import UsageError

KEY_SCOPE = "llmctl.api_key"
"""Where a request's scope has the ``ApiKey`` that it brought."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")  # not a number: keys of options are numbered
_HASH = re.compile(r"sha256:([0-9A-Fa-f]{64})")
# Its group may read it: a service's own user is often only in the group of its secrets.
_TOO_OPEN = 0o026


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One accepted key: what it is called where it must not be shown, and its sha256."""

    name: str
    digest: bytes
    may_set_priority: bool = False


class ServerKeys:
    """The accepted API keys.

    Args:
        api_key, priority_keys: comma-separated keys, named by their number; the latter may set a priority.
        file: more keys, see ``read_keys``.

    Raises:
        UsageError: what is given is not keys.
    """

    def __init__(self, api_key: str | None = None, priority_keys: str | None = None, file: Path | None = None) -> None:
        plain, privileged = _split(api_key, "api_key"), _split(priority_keys, "priority_keys")
        self._of_options = tuple(
            ApiKey(str(number), key_digest(key.encode()), key in privileged)
            for number, key in enumerate(dict.fromkeys([*plain, *privileged]))
        )
        self._file = file
        self._of_file: tuple[ApiKey, ...] = ()
        self._ever = frozenset(key.digest for key in self._of_options)
        self.reload()

    def __len__(self) -> int:
        return len(self._of_options) + len(self._of_file)

    @property
    def several(self) -> bool:
        """Whether keys tell clients apart: there are several, or a file, which may have several at any time."""
        return len(self) > 1 or self._file is not None

    @property
    def ever_accepted(self) -> frozenset[bytes]:
        """Digests of all keys since the start: a client may go on using one that was removed."""
        return self._ever

    def find(self, token: bytes) -> ApiKey | None:
        """The key that ``token`` is. Every digest is compared, in constant time, whatever the outcome."""
        digest = key_digest(token)
        matches = [key for key in chain(self._of_options, self._of_file) if hmac.compare_digest(digest, key.digest)]
        return matches[0] if matches else None

    def reload(self) -> None:
        """Read the file again, if there is one.

        Raises:
            UsageError: it cannot be read, or not as keys; those that it had stay accepted.
        """
        if self._file is None:
            return
        self._of_file = read_keys(self._file, {key.digest: key.name for key in self._of_options})
        self._ever |= {key.digest for key in self._of_file}

    def warning(self) -> str | None:
        """What is wrong with who may use the file; None: nothing."""
        if self._file is None or not self._file.stat().st_mode & _TOO_OPEN:
            return None
        return (
            f"--api-key-file {self._file}: its group may write it, or anyone may read or write it "
            f"(chmod 640 {_quoted(self._file)})"
        )


key_hash = hashlib.sha256
"""What keys are hashed with."""


def key_digest(key: bytes) -> bytes:
    """The digest of a key."""
    return key_hash(key).digest()


_EMPTY = key_digest(b"")


def _split(given: str | None, param: str) -> list[str]:
    keys = [key for key in (part.strip() for part in (given or "").split(",")) if key]
    if any(key.split() != [key] for key in keys):
        option = param.replace("_", "-")
        raise UsageError(
            f"--{option}: a key has white space, which no Bearer token can have",
            fix="put commas between keys",
            param=param,
        )
    return keys


def read_keys(file: Path, taken: Mapping[bytes, str]) -> tuple[ApiKey, ...]:
    """The keys of a file: lines of ``NAME sha256:HEX [priority]``; ``#`` begins a comment.

    No message shows a part of a line, which may be a key.

    Args:
        taken: digests that are accepted already.

    Raises:
        UsageError: unreadable; a line that is something else; a name or a key twice; no key at all.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"--api-key-file {file}: {reason}", param="api_key_file") from None
    found: dict[int, ApiKey] = {}
    for number, words in _entries(lines):
        problem = _problem(words, found, taken)
        if problem is not None:
            raise UsageError(
                f"--api-key-file {file}, line {number}: {problem}", fix=_append_command(file), param="api_key_file"
            )
        found[number] = _parsed(words)
    if not found:
        raise UsageError(f"--api-key-file {file}: no key in it", fix=_append_command(file), param="api_key_file")
    return tuple(found.values())


def _entries(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Numbers and words of lines that have any."""
    for number, line in enumerate(lines, start=1):
        words = line.split()
        comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
        if comment:
            yield number, words[:comment]


def _parsed(words: list[str]) -> ApiKey:
    return ApiKey(words[0], bytes.fromhex(words[1].removeprefix("sha256:")), len(words) == 3)


def _problem(words: list[str], found: Mapping[int, ApiKey], taken: Mapping[bytes, str]) -> str | None:
    """What is wrong with a line; None: nothing."""
    if len(words) not in (2, 3):
        return f"expected NAME sha256:HEX [priority], found {len(words)} word{'s' * (len(words) != 1)}"
    if not _NAME.fullmatch(words[0]):
        return "expected a name of a letter, then up to 63 letters, digits, '.', '_' or '-', before the hash"
    if not _HASH.fullmatch(words[1]):
        return "expected sha256: and 64 hexadecimal digits after the name"
    if len(words) == 3 and words[2] != "priority":
        return "expected nothing or the word priority after the hash"
    key = _parsed(words)
    for number, other in found.items():
        if other.name == key.name:
            return f"the name of line {number} again"
        if other.digest == key.digest:
            return f"the key of line {number} again"
    if key.digest in taken:
        return f"a key of --api-key or --priority-keys again (number {taken[key.digest]})"
    return "the hash of an empty key" if key.digest == _EMPTY else None


def _append_command(file: Path) -> str:
    """A shell command that adds the key in $KEY."""
    return f'echo "NAME sha256:$(printf %s "$KEY" | sha256sum | cut -c1-64)" >> {_quoted(file)}'


def _quoted(file: Path) -> str:
    return shlex.quote(str(file))
