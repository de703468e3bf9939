"""The outline of a request's body: how much it asks for, counted before objects are made of any of it.

Only for refusals that can be had cheaply: whatever is not as it should be counts as nothing here, and is refused in
words by the parser of the fields; what that one would let pass, by ``body.parsed``.
"""

from __future__ import annotations

import msgspec

from llmctl.engine.sampling_params import MAX_SAMPLES

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


class Outline:
    """The top-level fields of a JSON object, undecoded, the last of each name. Nothing for any other body.

    Attributes:
        problem: why it is nothing; None when it is an object.
    """

    def __init__(self, body: bytes) -> None:
        self._fields: dict[str, msgspec.Raw] = {}
        self.problem: str | None = None
        try:
            self._fields = _FIELDS.decode(body)
        except (ValueError, RecursionError) as error:
            self.problem = str(error)

    def has(self, name: str) -> bool:
        """Whether the field is given."""
        return name in self._fields

    def count(self, name: str) -> int:
        """Items of a field that is an array; 0 for anything else."""
        try:
            return len(_ITEMS.decode(self._fields[name]))
        except (KeyError, ValueError, RecursionError):
            return 0

    def ids(self, name: str) -> int:
        """Numbers of a field that is an array of numbers; 0 for anything else."""
        data = self._data(name)
        return data.count(b",") + 1 if _first_item(data) in "-0123456789" else 0

    def members(self, name: str) -> int:
        """Members of a field that is an object of numbers; no less for any other object, and 0 for anything else."""
        data = self._data(name)
        return data.count(b":") if data.startswith(b"{") else 0

    def prompts(self, name: str = "prompt") -> int:
        """How many prompts a field holds: 1 for a text or token ids, else the items of its array."""
        data = self._data(name)
        first = _first_item(data)
        if first == "[":  # lists of numbers: no string can hold another bracket
            return data.count(b"[") - 1 if b'"' not in data else self.count(name)
        return self.count(name) if first == '"' else 1

    def sequences(self) -> int:
        """Prompts times ``n``, which counts as 1 when it is out of its range."""
        try:
            n = msgspec.json.decode(self._fields["n"], type=int)
        except (KeyError, ValueError):
            n = 1
        return (n if 1 <= n <= MAX_SAMPLES else 1) * self.prompts()

    def _data(self, name: str) -> bytes:
        return bytes(self._fields.get(name, b""))


def _first_item(array: bytes) -> str:
    """The first character of an array's first item; a space for what is no array or an empty one."""
    if not array.startswith(b"["):
        return " "
    first = array[1:64].lstrip()[:1].decode("latin-1")
    return first if first not in ("", "]") else " "
