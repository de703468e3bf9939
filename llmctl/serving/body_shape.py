"""What is looked at in a long body before objects are made of it: msgspec's types, derived from pydantic's models.

msgspec decodes into these in about an eighth of the time that pydantic takes to make its models. A type here lets pass
whatever the model's own does, and more: patterns and validators are not looked at, and of fields that are ``Any``
nothing is made at all. So what it stumbles over is perhaps a fault, and what it lets pass may be one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmctl.serving.protocol import PART_TEXTS, ApiModel, ContentPart, only_numbers
from llmctl.serving.refused_fields import Only

_INT64 = range(-(2**63), 2**63)


class _Object(msgspec.Struct, gc=False):
    """Any object; nothing is made of its members."""


def _any_of(types: Iterable[Any]) -> Any:
    return Union[tuple(types)]  # noqa: UP007


_NARROWER: Mapping[Any, Any] = {
    ContentPart: _any_of(
        msgspec.defstruct(f"_{kind}", [(name, str)], gc=False, tag_field="type", tag=kind)
        for kind, name in PART_TEXTS.items()
    )
}
"""Models that are read more strictly than pydantic does: parts that are no text are perhaps refused, when the rest of
the request is read."""


@dataclass(frozen=True)
class Kinds:
    """The kinds of objects in a list, of which some may leave out their ``type``, as msgspec has it of all or of none.

    Attributes:
        typed: a decoder of the list, if all have their type; untyped: if all are of the kind that may leave it out.
        types: a decoder of the list, of whose objects it looks at the type alone.
        decoders: of an object, by its type.
    """

    typed: msgspec.json.Decoder[Any]
    untyped: msgspec.json.Decoder[Any]
    types: msgspec.json.Decoder[Any]
    decoders: Mapping[str, msgspec.json.Decoder[Any]]


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        fields: of each name in a body, decoders that look at it; several where it is a list of one of several kinds.
        kinds: of fields that are lists of several kinds at once.
        refused: fields that are refused whatever they are, but for a few short values.
    """

    fields: Mapping[str, tuple[msgspec.json.Decoder[Any], ...]]
    kinds: Mapping[str, Kinds]
    refused: frozenset[str]


@cache
def shape_of(model: type[ApiModel]) -> Shape:
    """The shape of a model's bodies."""
    names = {info.alias or name: info for name, info in model.model_fields.items()}
    return Shape(
        {name: tuple(map(msgspec.json.Decoder, _alternatives(info))) for name, info in names.items()},
        {name: kinds for name, info in names.items() if (kinds := _kinds(info)) is not None},
        frozenset(n for n, i in names.items() if i.annotation is Any and any(isinstance(m, Only) for m in i.metadata)),
    )


def _alternatives(info: FieldInfo) -> Sequence[Any]:
    """A field's types: msgspec takes no union with two kinds of list."""
    lists, others = _lists(info)
    return [_union([_type(one), *others]) for one in lists] if len(lists) > 1 else [_of_field(info)]


def _lists(info: FieldInfo) -> tuple[Sequence[Any], Sequence[Any]]:
    """The lists that a field may be, and the types of what else."""
    members = _members(info.annotation)
    lists = [one for one in members if get_origin(_bare(one)) is list]
    return lists, [_type(one) for one in members if one not in lists]


def _kinds(info: FieldInfo) -> Kinds | None:
    """Those of a field that is one list, if one of them may be left out."""
    lists, others = _lists(info)
    models = _models(get_args(_bare(lists[0]))[0]) if len(lists) == 1 else ()
    default = next((one for one in models if not _is_tagged(one)), None)
    if default is None:
        return None
    return Kinds(
        msgspec.json.Decoder(_of_field(info)),
        msgspec.json.Decoder(_union([list[_struct(default)], *others])),  # type: ignore[misc]
        msgspec.json.Decoder(list[msgspec.defstruct("_Kind", [("type", str, _tag(default))], gc=False)]),  # type: ignore[misc]
        {_tag(one): msgspec.json.Decoder(_struct(one)) for one in models},
    )


def _of_field(info: FieldInfo) -> Any:
    return _annotated(info.annotation, [*info.metadata, info])


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> Sequence[Any]:
    bare = _bare(annotation)
    return get_args(bare) if get_origin(bare) in (Union, UnionType) else [annotation]


def _models(annotation: Any) -> Sequence[type[BaseModel]]:
    """The models of a union that is told apart by ``type``; none for anything else."""
    found = [_bare(one) for one in _members(annotation)]
    models = [one for one in found if isinstance(one, type) and issubclass(one, BaseModel)]
    return models if len(models) == len(found) > 1 and all(map(_tag, models)) else ()


def _type(annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotated(args[0], args[1:])
    if annotation in (str, int, float, bool, None, NoneType):
        return annotation
    if origin is Literal:
        return annotation if all(isinstance(one, str) for one in args) else msgspec.Raw
    if origin is list:
        return list[_type(args[0])]  # type: ignore[misc]
    if origin is dict:
        value = _type(args[1])
        return _Object if value is msgspec.Raw else dict[str, value]  # type: ignore[valid-type]
    if origin in (Union, UnionType):
        models = _models(annotation)
        if models:
            return _any_of(_struct(one, _tag(one)) for one in models)
        return _union([_type(one) for one in args])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _NARROWER.get(annotation) or _struct(annotation)
    return msgspec.Raw


def _annotated(annotation: Any, metadata: Iterable[Any]) -> Any:
    before = [one for one in metadata if isinstance(one, BeforeValidator)]
    for one in before:  # what it makes another thing of, it says
        if one.json_schema_input_type is not PydanticUndefined:
            return _type(one.json_schema_input_type)
    if any(isinstance(one, AfterValidator) and one.func is only_numbers for one in metadata):
        return dict[str, float]
    found = _type(annotation)
    bounds: dict[str, Any] = {}
    flat = [inner for one in metadata for inner in (one.metadata if isinstance(one, FieldInfo) else [one])]
    for one in flat:
        if found in (int, float):
            bounds |= {
                name: getattr(one, name)
                for name, kind in (("ge", at.Ge), ("gt", at.Gt), ("le", at.Le), ("lt", at.Lt))
                if isinstance(one, kind) and (found is float or getattr(one, name) in _INT64)
            }
        elif found is str or get_origin(found) in (list, dict):
            bounds |= {
                name: getattr(one, name)
                for name, kind in (("min_length", at.MinLen), ("max_length", at.MaxLen))
                if isinstance(one, kind)
            }
    return Annotated[found, msgspec.Meta(**bounds)] if bounds else found


def _union(types: Sequence[Any]) -> Any:
    """A union that msgspec takes: of several kinds of object it lets pass any, of several kinds of list anything."""
    if msgspec.Raw in types or len([one for one in types if get_origin(_bare(one)) is list]) > 1:
        return msgspec.Raw
    kept = [one for one in types if not _is_object(one) and not (str in types and get_origin(one) is Literal)]
    objects = [one for one in types if _is_object(one)]
    return _any_of([*kept, *(objects if len(objects) < 2 else [_Object])])


def values_of(found: Any) -> Any:
    """The type of an object's values, be it in a union; None: it is none of ours."""
    members = [_bare(one) for one in _members(found)]
    return next((get_args(one)[1] for one in members if get_origin(one) is dict), None)


def depth_of_scalars(found: Any) -> int:
    """How deep in lists, be they in a union, strings or integers are; 0: that is something else."""
    lists = [one for one in map(_bare, _members(found)) if get_origin(one) is list]
    if not lists:
        return 0
    item = get_args(lists[0])[0]
    if _bare(item) in (str, int) or get_origin(item) is Literal:
        return 1
    depth = depth_of_scalars(item)
    return depth + 1 if depth else 0


def _is_object(found: Any) -> bool:
    return get_origin(found) is dict or (isinstance(found, type) and issubclass(found, msgspec.Struct))


def _tag(model: type[BaseModel]) -> str:
    """What the ``type`` of a model's objects is; empty where it may be one of several."""
    info = model.model_fields.get("type")
    tags = get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()
    return str(tags[0]) if len(tags) == 1 else ""


def _is_tagged(model: type[BaseModel]) -> bool:
    return model.model_fields["type"].is_required()


@cache
def _struct(model: type[BaseModel], tag: str = "") -> Any:
    """The struct of a model; of its fields only those that can be wrong."""
    fields: list[Any] = []
    for name, info in model.model_fields.items():
        found = _of_field(info)
        if (name == "type" and tag) or (found is msgspec.Raw and not info.is_required()):
            continue
        default = {} if info.is_required() else {"default": None}
        fields.append((name, found, msgspec.field(name=info.alias or name, **default)))
    options: dict[str, Any] = {"tag_field": "type", "tag": tag} if tag else {}
    strict = model.model_config.get("extra") == "forbid"
    return msgspec.defstruct(
        f"_{model.__name__}", fields, gc=False, forbid_unknown_fields=strict, kw_only=True, **options
    )
