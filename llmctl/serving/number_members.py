"""JSON objects whose names are token ids and whose values are numbers, read as one list of both.

A decoder of objects makes a string of every name, and looks up each: three times what it takes to decode the numbers.
Whatever is not plain is left to one.
"""

from __future__ import annotations

import msgspec

_OF_NUMBERS = b"0123456789.-+eE"
_FOREIGN = bytes(0 if byte in _OF_NUMBERS + b',:"{} ' else 1 for byte in range(256))
_AS_LIST = bytes.maketrans(b"{}:", b"[],")
_NUMBERS = msgspec.json.Decoder(list[int | float])


def plain_members(data: bytes) -> tuple[list[int], list[float]] | None:
    """Names and values of a JSON object's members; None: there are none, or a name is there twice, or the object is not
    plain: it has anything but digits in a name, other values than numbers, or other spaces than a writer puts in.

    Args:
        data: well-formed JSON.
    """
    count = data.count(b":")
    frame = data.translate(None, _OF_NUMBERS)
    if not count or not any(frame == _frame(count, space) for space in (b"", b" ")):
        return None
    if b"-" in data and b'"-' in data:
        return None
    try:
        flat = _NUMBERS.decode(data.translate(_AS_LIST, b'"'))
    except ValueError:
        return None
    names, values = flat[::2], flat[1::2]
    maybe_floats = any(mark in data for mark in (b".", b"e", b"E"))
    if (maybe_floats and not {int}.issuperset(map(type, names))) or len({*names}) < count:
        return None
    return names, values  # type: ignore[return-value]


def _frame(count: int, space: bytes) -> bytes:
    """What is left of an object of so many numbers without these."""
    member = b'"":' + space
    return b"{" + (member + b"," + space) * (count - 1) + member + b"}"


def behind_plain_members(data: bytes) -> bytes:
    """A JSON object from its first member on that is not plain, as far as a comma tells where that begins.

    It is malformed where that comma is in a string, or in an object in this one. What it has is as in the whole.
    """
    comma = data.rfind(b",", 0, max(0, data.translate(_FOREIGN).find(1)))
    return data if comma < 0 else b"{" + data[comma + 1 :]
