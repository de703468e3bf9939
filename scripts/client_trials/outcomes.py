"""What came of the scenarios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "failed", "none", "not tried"]


@dataclass(frozen=True)
class Outcome:
    """Of one scenario. ``none``: the client has no such feature. reason: of a failure, or why it was not tried."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """Of one client. version: what was installed, empty when nothing was. outcomes: by scenario, all of them."""

    client: str
    version: str
    outcomes: Mapping[str, Outcome]
