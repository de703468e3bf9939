"""Frozen dataclasses <-> plain JSON data, driven by the fields alone: unknown, missing and mistyped keys are refused.

Handles nested dataclasses, ``tuple[X, ...]``, ``Mapping[str, X]``, ``X | None``, ``int``, ``float``, ``str``, ``bool``,
and the types of ``_CODECS``, which have their own functions.
"""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from llmctl.graph.graph import Graph
from llmctl.graph.serial import graph_from_dict, graph_to_dict

T = TypeVar("T")

_CODECS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {Graph: (graph_to_dict, graph_from_dict)}
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def to_data(value: Any) -> Any:
    """A dataclass as JSON data (dicts, lists, scalars)."""
    if type(value) in _CODECS:
        return _CODECS[type(value)][0](value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_data(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_data(item) for item in value]
    return value


def from_data(kind: type[T], data: Any, where: str = "") -> T:
    """The ``kind`` that ``to_data`` wrote.

    Raises:
        ValueError: unknown or missing key, or a value of the wrong type; the message names its path.
    """
    return typing.cast(T, _decode(kind, data, where))


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind in _CODECS:
        return _CODECS[kind][1](data)
    if is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if data is None else _decode(inner, data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is Mapping:
        _expect(isinstance(data, dict), where, "an object", data)
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    allowed = (int, float) if kind is float else kind
    _expect(isinstance(data, allowed) and (kind is bool or not isinstance(data, bool)), where, _NAMES[kind], data)
    return data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where or kind.__name__, "an object", data)
    hints = _hints(kind)
    names = [f.name for f in fields(kind)]
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise ValueError(
                f"unknown key '{prefix}{key}'" + (f"; the nearest known one is '{near[0]}'" if near else "")
            )
    for name in names:
        if name not in data:
            raise ValueError(f"key '{prefix}{name}' is missing")
    return kind(**{name: _decode(hints[name], data[name], prefix + name) for name in names})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(ok: bool, where: str, wanted: str, found: Any) -> None:
    if not ok:
        raise ValueError(f"{where}: expected {wanted}, found {type(found).__name__}")
