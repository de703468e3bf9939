"""Random JSON schemas, of the keywords that can be enforced and a few that cannot."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ["a", "b", "ab", "x y", "é", 'a"b', "id"]
_VALUES: list[Any] = [1, 2, "a", "bb", None, True, {"x": [1]}, 'é"', [1, 2], 3.5]
_PATTERNS = ["^a+b?$", "[0-9]{2}", "^(x|yz)", "é$", "^.{2,4}$", "a.c"]
_FORMATS = ["date", "date-time", "uuid", "ipv4", "email"]


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of at most ``depth`` levels."""
    leaves = (_string, _integer, _number, _types, _enum, _const)
    if depth == 0 or rng.random() < 0.35:
        return rng.choice(leaves)(rng)
    return rng.choice((_object, _object, _array, _choice, _recursive))(rng, depth - 1)


def _some(rng: random.Random, share: float, **keywords: Any) -> dict[str, Any]:
    """Each keyword with a probability."""
    return {name: value for name, value in keywords.items() if rng.random() < share}


def _string(rng: random.Random) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.2:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind < 0.3:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    return {"type": "string"} | _some(rng, 0.4, minLength=rng.randrange(4), maxLength=rng.randrange(3, 8))


def _integer(rng: random.Random) -> dict[str, Any]:
    bounds = {"minimum": rng.randrange(-20, 20), "maximum": rng.randrange(20, 300), "multipleOf": rng.choice([2, 3, 7])}
    return {"type": "integer"} | _some(rng, 0.3, **bounds)


def _number(rng: random.Random) -> dict[str, Any]:
    bounds = {"minimum": rng.choice([-1.5, 0, 2.25]), "exclusiveMaximum": rng.choice([3.5, 100])}
    return {"type": "number"} | _some(rng, 0.4, **bounds)


def _types(rng: random.Random) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"], ["number", "string"]])}


def _enum(rng: random.Random) -> dict[str, Any]:
    return {"enum": rng.sample(_VALUES, rng.randrange(1, 5))} | _some(rng, 0.2, type="string", minLength=2)


def _const(rng: random.Random) -> dict[str, Any]:
    return {"const": rng.choice(_VALUES)}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    properties = {name: random_schema(rng, depth) for name in rng.sample(_NAMES, rng.randrange(5))}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = rng.sample(sorted(properties), rng.randrange(len(properties) + 1))
    others = rng.random()
    if others < 0.7:
        schema["additionalProperties"] = False if others < 0.5 else random_schema(rng, depth)
    counts = {"minProperties": rng.randrange(4), "maxProperties": rng.randrange(5)}
    patterns = {"patternProperties": {rng.choice(["^x_", "b$", "^[0-9]"]): random_schema(rng, depth)}}
    return schema | _some(rng, 0.15, **counts, **patterns)


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    keywords = {"items": random_schema(rng, depth), "minItems": rng.randrange(3), "maxItems": rng.randrange(2, 5)}
    rare = {"uniqueItems": True, "prefixItems": [random_schema(rng, depth)]}
    return {"type": "array"} | _some(rng, 0.6, **keywords) | _some(rng, 0.15, **rare)


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return {rng.choice(["anyOf", "oneOf", "allOf"]): [random_schema(rng, depth) for _ in range(rng.randrange(1, 4))]}


def _recursive(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth < 2:  # "#" names the whole schema
        return _const(rng)
    node = {"type": "object", "properties": {"v": random_schema(rng, 1), "next": {"$ref": "#/$defs/node"}}}
    return {"$ref": "#/$defs/node", "$defs": {"node": node}} if depth == 2 else _string(rng)
