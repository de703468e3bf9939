"""The table of clients and scenarios: for a terminal, for the documentation, as data."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from md_table import markdown_table

from client_trials.catalog import SCENARIOS
from client_trials.outcomes import Trial, Verdict

_WIDTH, _COLUMN = 80, 4
_SIGNS: dict[Verdict, str] = {"ok": "ok", "failed": "ERR", "none": "–", "not tried": "n/t"}
_WORDS: dict[Verdict, str] = {"ok": "ok", "failed": "**fails**", "none": "–", "not tried": "not tried"}


def failures(trials: Sequence[Trial]) -> int:
    """Scenarios that failed."""
    return sum(outcome.verdict == "failed" for trial in trials for outcome in trial.outcomes.values())


def to_line(trial: Trial) -> str:
    """How a client did, in short."""
    counts = Counter(outcome.verdict for outcome in trial.outcomes.values())
    return f"{_title(trial)}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def to_text(trials: Sequence[Trial]) -> str:
    """At most 80 columns wide: columns are numbered, and named below."""
    wide = max(len(_title(trial)) for trial in trials)
    numbers = range(1, len(SCENARIOS) + 1)
    lines = [" " * wide + "".join(f"{number:>{_COLUMN}}" for number in numbers)]
    for trial in trials:
        cells = "".join(f"{_SIGNS[trial.outcomes[name].verdict]:>{_COLUMN}}" for name in SCENARIOS)
        lines.append(f"{_title(trial):<{wide}}{cells}")
    legend = ", ".join(f"{number} {title}" for number, title in zip(numbers, SCENARIOS.values(), strict=True))
    lines += ["", *textwrap.wrap(f"{legend}. –: no such feature; n/t: not tried.", _WIDTH)]
    for reason in _reasons(trials):
        lines += ["", *textwrap.wrap(reason, _WIDTH)]
    return "\n".join(lines)


def to_markdown(trials: Sequence[Trial], circumstances: str) -> str:
    """Circumstances, table, and the reason of every failure below."""
    head = ("client", *SCENARIOS.values())
    rows = [(_title(trial), *(_WORDS[trial.outcomes[name].verdict] for name in SCENARIOS)) for trial in trials]
    reasons = ["* " + reason.replace("|", "\\|") for reason in _reasons(trials)]
    return "\n".join([circumstances, "", markdown_table(head, rows), *([""] if reasons else []), *reasons])


def to_json(trials: Sequence[Trial], circumstances: str) -> dict[str, Any]:
    """The same as data."""
    return {"circumstances": circumstances, "trials": [asdict(trial) for trial in trials]}


def _title(trial: Trial) -> str:
    return f"{trial.client} {trial.version}".rstrip()


def _reasons(trials: Sequence[Trial]) -> list[str]:
    """A line for each reason of each client, with the scenarios that it is the reason of."""
    lines = []
    for trial in trials:
        titles: dict[str, list[str]] = {}
        for name, outcome in trial.outcomes.items():
            if outcome.reason:
                titles.setdefault(outcome.reason, []).append(SCENARIOS[name])
        for reason, which in titles.items():
            said = "all" if len(which) == len(SCENARIOS) else ", ".join(which)
            lines.append(f"{trial.client}: {said}: {reason}")
    return lines
