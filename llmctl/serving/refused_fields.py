"""Fields of requests that are known and never honoured: refused where types are checked, in words, and described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

NOT_SUPPORTED = "not_supported"
"""The type of pydantic's error; its message says all."""


def refusal(message: str) -> PydanticCustomError:
    """What a validator raises of a field that is refused."""
    return PydanticCustomError(NOT_SUPPORTED, "{message}", {"message": message})


@dataclass(frozen=True)
class Only:
    """Of a field that is known, and is refused when it is set to anything but ``values``: ``why``, or what to set."""

    why: str = "not supported"
    values: tuple[Any, ...] = (None,)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Part of pydantic's protocol for annotations."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Part of pydantic's protocol for annotations."""
        return {"enum": list(self.values), "description": f"Anything else is refused: {self.why}."}

    def _check(self, value: Any) -> Any:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values):
            raise refusal(self.why)
        return value


def not_here(use: str = "", values: tuple[Any, ...] = (None,)) -> Only:
    """Of a field of another API: what to ``use`` instead, if there is something. ``values`` say nothing."""
    return Only("not a field of this endpoint" + (f"; use {use}" if use else ""), values)
