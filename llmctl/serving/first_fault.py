"""The first fault of a long body, told without making objects of all that is around it.

pydantic takes about eight times as long for a list of messages as msgspec takes to look at what matters in it. So the
short fields of a body are given to the parser by themselves; of each long one, what msgspec stumbles over
(``body_shape``) is, in a body of just that: the parser says whether it is a fault, and in which words. What is no fault
to it, and what msgspec lets pass, is for the parser of the whole body.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmctl.errors import RequestError
from llmctl.serving.body_shape import Kinds, depth_of_scalars, shape_of, values_of
from llmctl.serving.number_members import behind_plain_members, plain_members
from llmctl.serving.openai_errors import UNION_TAG, problem_told
from llmctl.serving.outline import TOO_DEEP, Outline, count_texts
from llmctl.serving.protocol import ApiModel, ChatMessage, ChatRequest, ContentPart, are_tool_names
from llmctl.serving.sampling_fields import bias_ids
from llmctl.serving.tools.history import joined, template_message

LEAST_BYTES = 16 * 1024
"""Shorter bodies are parsed at once."""
_SHORT = 512  # bytes of a value that is given to the parser as it is
_BEGINNING = 2048  # bytes of an object in which a wrong member is looked for before it is decoded as a whole
_MOST_CUTS = 8
_KEPT = ("type", "role")  # of a long object: what says how the member is read that is a fault

_PATH = re.compile(r" - at `\$([^`]*)`$")
_STEP = re.compile(r"\[(\d+)\]|\.(\w+)|\[(\.\.\.)\]")
_FIELD = re.compile(r"(?:required|unknown) field `([^`]*)`")
_MOST = re.compile(r"`array` of length <= (\d+)")
_GOT = re.compile(r"got `(array|object)`")
_TAG = re.compile(rf"^{UNION_TAG}|^[A-Z]|[\[-]|^(str|int|float|bool|dict)$")  # in pydantic's paths: one of a union
_SPACES = b" \t\r\n"
_EMPTY = {b"[": b"[]", b"{": b"{}"}
_LEAST_ITEM = {b"[": b"[]", b'"': b'""'}
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECT: msgspec.json.Decoder[Mapping[str, Any]] = msgspec.json.Decoder(dict[str, Any])
_ANY = msgspec.json.Decoder(msgspec.Raw)


class _FirstItem(msgspec.Struct, array_like=True):
    item: msgspec.Raw


_FIRST = msgspec.json.Decoder(_FirstItem)
_NO_PROMPT = {"messages": b'[{"role":"user","content":""}]', "prompt": b'""', "input": b'""'}
"""Fields that a request cannot do without, and the least that they can be."""
T = TypeVar("T")
Body = TypeVar("Body", bound=ApiModel)
CheckIds = Callable[[str, Any], object]
"""Given a field's name, and what it holds: token ids, lists of them, a list of ids and one of biases, or what else."""
Steps = Sequence[int | str]
"""A path to a value: indices and names."""


def check_json(data: bytes, problem: str, model: type[ApiModel]) -> None:
    """Refuse a long body that is no JSON object as the parser does; what is malformed is told in other words.

    Args:
        problem: of msgspec, with the body.

    Raises:
        RequestError: always, if the body is long.
    """
    if len(data) < LEAST_BYTES:
        return
    text = data.lstrip(_SPACES)
    if text.startswith(b"{"):
        raise RequestError(f"the request body is not valid JSON: {problem}")
    try:
        _ANY.decode(data)
    except (ValueError, RecursionError) as error:
        said = TOO_DEEP if isinstance(error, RecursionError) else error
        raise RequestError(f"the request body is not valid JSON: {said}") from None
    _parse(model, {}, _EMPTY.get(text[:1], b"0"))


def check_first_fault(
    outline: Outline,
    model: type[Body],
    check_scalars: Callable[[Body], object] = lambda _: None,
    check_ids: CheckIds = lambda *_: None,
) -> None:
    """Refuse a long body for a fault of a short field, or the first in one of the long ones.

    Args:
        check_scalars: given the body with its short fields alone, and in place of a prompt an empty one; may refuse it.
        check_ids: given the name of each long field that has no fault of its own, and what it holds; may refuse it.

    Raises:
        RequestError: as the parser of the whole body, but that it may be another one of its faults.
        CapacityError: by ``check_ids``.
    """
    if len(outline.body) < LEAST_BYTES:
        return
    shape, given = shape_of(model), outline.of_model(model)
    short = {name: value for name, value in given.items() if len(value) <= _SHORT}
    long = {name: value for name, value in given.items() if len(value) > _SHORT}
    for name in shape.refused & long.keys():  # whatever is in them, unless it is nothing
        value = long.pop(name)
        nothing = _EMPTY.get(value[:1], b"")
        short[name] = nothing if nothing and value[1:].lstrip(_SPACES)[:1] == nothing[1:] else b"[0]"
    stand_ins = {name: _NO_PROMPT[name] for name in _NO_PROMPT.keys() & long.keys()}
    body = _parse(model, {**stand_ins, **short}, within=shape.fields.keys() - long.keys())
    if body is not None:
        check_scalars(body)
    for name, value in long.items():
        found = _looked_at(model, name, value)
        if found is None:
            continue
        if name == "messages" and issubclass(model, ChatRequest):
            _check_contents(value, found)
        elif name in ("tools", "functions"):
            _check_names(model, name, value, found)
        check_ids(name, found)


def _looked_at(model: type[ApiModel], name: str, data: bytes) -> Any:
    """What there is to see in a long field, which is refused for its first fault."""
    shape = shape_of(model)
    if name in shape.kinds:
        return _of_kinds(model, shape.kinds[name], name, data)
    decoders = shape.fields[name]
    if values_of(decoders[0].type) is float and data.startswith(b"{"):
        return _biases(model, name, data)
    furthest: tuple[Steps, str] | None = None
    plain = 0
    for decoder in decoders:
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            steps = _steps(str(error), data, decoder)
            if furthest is None or _reach(steps) > _reach(furthest[0]):
                furthest, plain = (steps, str(error)), depth_of_scalars(decoder.type)
        except (ValueError, RecursionError):
            return None
    if furthest is not None:
        _confirm(model, name, data, *furthest, several=len(decoders) > 1, plain=plain == len(steps))
    return None


def _of_kinds(model: type[ApiModel], kinds: Kinds, name: str, data: bytes) -> Any:
    """The same of a list of objects of several kinds."""
    begin = 0
    for decoder in (kinds.typed, kinds.untyped):
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            message = str(error)
            steps = _steps(message, data, decoder)
            other = list(steps[1:]) == ["type"]  # perhaps of a kind that this decoder does not know
            if not other or (decoder is kinds.typed and not _FIELD.search(message)):
                return _confirm(model, name, data, steps, message)
            begin = max(begin, int(steps[0]))
        except (ValueError, RecursionError):
            return None
    try:
        items, types = _ITEMS.decode(data), [one.type for one in kinds.types.decode(data)]
    except msgspec.ValidationError as error:
        return _confirm(model, name, data, _steps(str(error), data, kinds.types), str(error))
    except (ValueError, RecursionError):
        return None
    for index in range(begin, len(items)):
        if types[index] not in kinds.decoders:
            return _confirm(model, name, data, [index], "")
        decoder = kinds.decoders[types[index]]
        try:
            decoder.decode(items[index])
        except msgspec.ValidationError as error:
            return _confirm(model, name, data, [index, *_steps(str(error), bytes(items[index]), decoder)], str(error))
        except (ValueError, RecursionError):  # no UTF-8: nobody has looked into the items before
            return None
    return None


def _steps(message: str, data: bytes, decoder: msgspec.json.Decoder[Any]) -> Steps:
    """The path in a message of msgspec about some JSON; as far as it is said."""
    found = _PATH.search(message)
    steps: list[int | str] = []
    for index, name, unsaid in _STEP.findall(found[1] if found is not None else ""):
        if unsaid:
            return steps or [_wrong_member(data, values_of(decoder.type))]
        steps.append(int(index) if index else name)
    return [*steps, *_FIELD.findall(message)[:1]]


def _wrong_member(data: bytes, wanted: Any) -> str:
    """The first member of an object whose value is none that is ``wanted``; "": what comes after it is no JSON."""
    wrong = _first_unlike(_beginning(data, _OBJECT, b"}") or {}, wanted)
    if wrong is None:
        with suppress(ValueError, RecursionError):  # the decoder went no further than that value
            wrong = _first_unlike(_OBJECT.decode(data), wanted)
    return wrong or ""


def _first_unlike(members: Mapping[str, Any], wanted: Any) -> str | None:
    """The name of the first member whose value is none that is ``wanted``."""
    try:
        msgspec.convert([*members.values()], list[wanted])
    except msgspec.ValidationError as error:
        index = _STEP.search(str(error))
        return next(islice(members, int(index[1]), None)) if index is not None else None
    return None


def _biases(model: type[ApiModel], name: str, data: bytes) -> Any:
    """Token ids and biases of an object of these. Which member is wrong takes as long to find out as to decode all, so
    it is looked for at the beginning, and where one is unlike numbers."""
    _check_numbers(model, name, _beginning(data, _OBJECT, b"}") or {})
    found = plain_members(data)
    if found is not None:
        return found
    for part in dict.fromkeys((behind_plain_members(data), data)):
        try:
            members = _OBJECT.decode(part)
        except (ValueError, RecursionError):
            found = None
            continue
        _check_numbers(model, name, members)
        found = (bias_ids(members), [*members.values()]) if members else None
    return found


def _check_numbers(model: type[ApiModel], name: str, members: Mapping[str, Any]) -> None:
    """Refuse members of an object of which one is no number."""
    wrong = _first_unlike(members, float)
    if wrong is not None:
        value = members[wrong]  # of which the type is told
        value = value if value is None or isinstance(value, bool | int) else type(value)()
        _confirm(model, name, msgspec.json.encode({wrong: value}), [wrong], "")


def _beginning(data: bytes, decoder: msgspec.json.Decoder[T], end: bytes) -> T | None:
    """What is in the first few KB of a long array or object, to whose ``end`` they are brought, as far as it is easily
    told; None: it is not."""
    data = data[:_BEGINNING]
    for _ in range(_MOST_CUTS):
        data, comma, _ = data.rpartition(b",")
        if not comma:
            break
        with suppress(ValueError, RecursionError):
            return decoder.decode(data + end)
    return None


def _reach(steps: Steps) -> tuple[int, bool]:
    """How far a decoder has come: to which item, and into it, or only to see that it is of another kind."""
    return steps[0] if steps and isinstance(steps[0], int) else -1, list(steps[1:]) != ["type"]


def _confirm(
    model: type[ApiModel],
    name: str,
    data: bytes,
    steps: Steps,
    message: str,
    *,
    several: bool = False,
    plain: bool = False,
) -> None:
    """Refuse a field for the value on a path, if that is a fault to the parser, too.

    Args:
        several: the list may be of several kinds: of which it is, its first item says. plain: all that is before the
            value in its list are strings or integers.
    """
    at = [*steps]  # of a fault: in what tells kinds of objects apart, that is the object
    if at[-1:] == ["type"]:
        at.pop()
        if several or not _FIELD.search(message):  # of another kind all may be right, or of the one that is not said
            steps = at
    count: dict[str, str] = {}
    leaf = _emptied if _GOT.search(message) else _whole
    if most := _MOST.search(message):
        leaf = partial(_begun, int(most[1]), count)
    try:
        alone = _alone(data, steps, leaf, plain=plain)
        if several and steps and steps[0]:  # any value of its kind says as much as the first
            alone = b"[" + _LEAST_ITEM.get(data[1:].lstrip(_SPACES)[:1], b"0") + b"," + alone[1:]
    except (ValueError, LookupError):  # the fault is in a member that another of its name replaces
        return
    indices = [step for step in steps if isinstance(step, int)]
    items_only = several and not any(isinstance(step, str) for step in at)
    under = [] if items_only else [0 if isinstance(step, int) else step for step in at]
    if several and under and steps[0]:  # behind the first
        under[0] = 1
    body = _parse(model, {name: alone}, within=(name,), under=under, indices=indices, said=count)
    if isinstance(body, ChatRequest) and indices:
        template_message(body.messages[0], indices[0], string_arguments=True)
    elif body is not None and len(steps) > 2:
        _check_parts(getattr(body, name), str(steps[1]), f"{name}[{indices[0] if indices else 0}]")


def _check_parts(items: Any, field: str, where: str) -> None:
    """Refuse a content of the last item whose part is no text; if it is a content's that is read so."""
    parts = getattr(items[-1], field, None) if isinstance(items, list) else None
    if isinstance(parts, list) and parts and isinstance(parts[0], ContentPart):
        joined(parts, f"{where}.{field}")


def _parse(
    model: type[Body],
    fields: Mapping[str, bytes],
    whole: bytes | None = None,
    *,
    within: Collection[str] | None = None,
    under: Steps = (),
    indices: Sequence[int] = (),
    said: Mapping[str, str] = MappingProxyType({}),
) -> Body | None:
    """What the parser makes of some fields; None: it refuses them for want of others.

    Args:
        whole: the body, in place of the fields. within: only faults of these count; None: all. under: only those on
            this path in them. indices: see ``problem_told``. said: words of a refusal, and those that it says instead.

    Raises:
        RequestError: for the first fault that counts.
    """
    if whole is None:
        whole = b"{" + b",".join(b'"%s":%s' % (name.encode(), value) for name, value in fields.items()) + b"}"

    def counts(problem: ErrorDetails) -> bool:
        place = problem["loc"]
        if within is None:
            return True
        if not place or place[0] not in within:
            return False
        said = [part for part in place[1:] if isinstance(part, int) or not _TAG.search(part)]
        return all(a == b for a, b in zip(said, under, strict=False))  # either goes on where the other ends

    try:
        return model.model_validate_json(whole)
    except ValidationError as error:
        told = problem_told(error, model.expected, indices, counts)
    if told is None:
        return None
    for words, others in said.items():
        told.message = told.message.replace(words, others)
    try:
        raise told
    finally:
        del told  # it would hold its traceback, which holds this frame and the body


def _whole(data: bytes) -> bytes:
    return data


def _emptied(data: bytes) -> bytes:
    """JSON of the same kind; the same, if it is short."""
    return _EMPTY.get(data[:1], data) if len(data) > _SHORT else data


def _begun(most: int, count: dict[str, str], data: bytes) -> bytes:
    """The beginning of a list that has more than ``most`` items: one more. ``count`` is told what a refusal of it says,
    and what it is to say."""
    items = _beginning(data, _ITEMS, b"]") or []
    if len(items) <= most or not data.startswith(b'["'):
        items = _ITEMS.decode(data)
        found = len(items)
    else:
        found = count_texts(data)
    count[f"not {most + 1}"] = f"not {found}"
    return b"[" + b",".join(map(bytes, items[: most + 1])) + b"]"


def _alone(data: bytes, steps: Steps, leaf: Callable[[bytes], bytes], *, plain: bool = False) -> bytes:
    """JSON in which of every list on a path only the item is left that the path goes through, and of every long object
    only the member.

    Args:
        leaf: what is left of the value at its end. plain: as ``_confirm``.
    """
    if not steps:
        return leaf(data)
    step, *rest = steps
    if isinstance(step, int):
        item = _behind_scalars(data, step) if plain and not rest else _item(data, step)
        return b"[" + _alone(item, rest, leaf, plain=plain) + b"]"
    if len(data) > _SHORT:
        kept = (step, *(name for name in _KEPT if name != step))
        fields = [(f"f{i}", msgspec.Raw, msgspec.field(name=name, default=_NONE)) for i, name in enumerate(kept)]
        found = msgspec.json.decode(data, type=msgspec.defstruct("_Kept", fields))
        members = dict(zip(kept, msgspec.structs.astuple(found), strict=True))
        members = {name: raw for name, raw in members.items() if len(bytes(raw)) > 0}
    else:
        members = _MEMBERS.decode(data)
    if step in members:
        members[step] = msgspec.Raw(_alone(bytes(members[step]), rest, leaf))
    return msgspec.json.encode(members)


_NONE = msgspec.Raw(b"")


def _item(data: bytes, index: int) -> bytes:
    """An item of a list."""
    return bytes(_ITEMS.decode(data)[index]) if index else _first(data)


def _behind_scalars(data: bytes, index: int) -> bytes:
    """An item of a list that has nothing but strings before it, or nothing but integers. To cut at quotes or commas
    takes half of what it takes to decode all items, and next to nothing near an end."""
    mark, each = (b'"', 2) if data[1:].lstrip(_SPACES).startswith(b'"') else (b",", 1)
    if not index or (each == 2 and b"\\" in data):
        return _item(data, index)
    before = each * index
    after = data.count(mark) - before
    if before < after:
        rest = data.split(mark, before)[-1]
    else:
        rest = data[data.rsplit(mark, after)[0].rindex(mark) + 1 :]
    return _first(b"[" + (rest if each == 1 else rest.lstrip(_SPACES)[1:]))  # behind a string there is the comma


def _first(data: bytes) -> bytes:
    return bytes(_FIRST.decode(data).item)


def _check_contents(data: bytes, messages: Sequence[Any]) -> None:
    """Refuse messages of which one has no content, and is not an assistant's."""
    for index, one in enumerate(messages):
        if one.content is None and one.role != "assistant":
            template_message(ChatMessage.model_validate_json(_item(data, index)), index)


def _check_names(model: type[ApiModel], name: str, data: bytes, tools: Sequence[Any]) -> None:
    """Refuse tools, or functions, of which one has a name that no tool has."""
    names = [getattr(one, "function", one).name for one in tools]
    if names and not are_tool_names(names):
        index = next(index for index, one in enumerate(names) if not are_tool_names([one]))
        _confirm(model, name, data, [index, *(["function"] if hasattr(tools[0], "function") else []), "name"], "")
