"""A profile for people: tables, and bars of where each step's time goes as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from xml.sax.saxutils import escape

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmctl.evaluate import svg

_COLOURS = ("#00897b", "#1d4ed8", "#c2410c", "#7e22ce", "#a16207", "#be123c", "#0e7490", "#4d7c0f", "#9ca3af")
_REST = "sampling, host, gaps"
_MOST_PARTS = 8
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 860, 150, 150, 24, 22, 84
_MIN_SHARE_WITH_WORD = 0.08

Step = Mapping[str, Any]
Show = Callable[[Step], str]


def print_profile(result: Mapping[str, Any], console: Console) -> None:
    """Steps against their bounds, time by part, the growth with context."""
    steps, points = result["steps"], result["contexts"]
    console.print(_headline(result), markup=False, highlight=False)
    if steps:
        console.print(_table("", steps, _bounds_rows(steps)))
        console.print(_table(f"us by {result['parts']}", steps, _part_rows(steps)))
    if points:
        console.print(_growth_table(points))
    if result["growth"] is not None:
        console.print(_growth_line(result["growth"]), markup=False, highlight=False)


def _headline(result: Mapping[str, Any]) -> str:
    threads = "" if result["threads"] is None else f", {result['threads']} threads"
    return (
        f"{result['model_id']} on {result['variant']}{threads}: reads {result['read_beyond_caches'] / 1e9:.1f} GB/s of "
        "what no cache holds"
    )


def _bounds_rows(steps: Sequence[Step]) -> list[tuple[str, Show]]:
    rows: list[tuple[str, Show]] = [
        ("step, us", lambda p: f"{p['step']:,.0f}"),
        ("quartiles", lambda p: f"{p['quartiles'][0]:,.0f}–{p['quartiles'][1]:,.0f}"),
        ("tokens/s", lambda p: f"{p['tokens'] / p['step'] * 1e6:,.0f}"),
        ("weights, MB", lambda p: f"{p['work']['weight_bytes'] / 1e6:.1f}"),
        ("KV cache, MB", lambda p: f"{p['work']['kv_bytes'] / 1e6:.1f}"),
        ("reads, GB/s", lambda p: f"{p['bounds']['read'] / 1e9:.1f}"),
        ("% of read bound", lambda p: _of_bound("read", p)),
        ("int8 GMAC", lambda p: f"{p['work']['int_macs'] / 1e9:.2f}"),
        ("float GMAC", lambda p: f"{p['work']['float_macs'] / 1e9:.2f}"),
    ]
    for name, field in (("int8", "int_macs"), ("float", "float_macs")):
        if any(name in p["bound"] for p in steps):
            rows.append((f"{name}, GMAC/s", partial(_rate, field)))
            rows.append((f"% of {name} bound", partial(_of_bound, name)))
    return rows


def _of_bound(name: str, step: Step) -> str:
    return f"{100 * step['bound'][name] / step['step']:.0f}" if name in step["bound"] else "-"


def _rate(field: str, step: Step) -> str:
    value = step["bounds"][field]
    return "-" if value is None else f"{value / 1e9:,.0f}"


def _part_rows(steps: Sequence[Step]) -> list[tuple[str, Show]]:
    names = parts(steps)
    rows: list[tuple[str, Show]] = [(name, partial(_part, name)) for name in names]
    return [*rows, (_REST, lambda p: share(p, rest(p, names)))]


def _part(name: str, step: Step) -> str:
    return share(step, step["parts"].get(name, 0.0))


def parts(steps: Sequence[Step]) -> list[str]:
    """The parts that take most in some step, the largest share first."""
    names = {name for step in steps for name in step["parts"]}
    return sorted(names, key=lambda n: -max(p["parts"].get(n, 0.0) / p["step"] for p in steps))[:_MOST_PARTS]


def rest(step: Step, shown: Sequence[str]) -> float:
    """Microseconds in none of these parts."""
    return float(step["other"]) + sum(time for name, time in step["parts"].items() if name not in shown)


def share(step: Step, microseconds: float) -> str:
    """``1,234 (56%)``."""
    return f"{microseconds:,.0f} ({100 * microseconds / step['step']:.0f}%)"


def _table(title: str, steps: Sequence[Step], rows: Sequence[tuple[str, Show]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(title)
    for step in steps:
        table.add_column(step["name"], justify="right")
    for words, show in rows:
        table.add_row(words, *(show(step) for step in steps))
    return table


def _attention(step: Step) -> float:
    return float(sum(time for name, time in step["parts"].items() if "attention" in name))


def _growth_table(points: Sequence[Step]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("context", "step, us", "attention, us", "KV, MB", "reads, GB/s", "% of read bound"):
        table.add_column(column, justify="right")
    for p in points:
        table.add_row(
            *(f"{p['context']:,}", f"{p['step']:,.0f}", share(p, _attention(p))),
            *(f"{p['work']['kv_bytes'] / 1e6:.1f}", f"{p['bounds']['read'] / 1e9:.1f}", _of_bound("read", p)),
        )
    return table


def _growth_line(line: Mapping[str, float]) -> str:
    said = [
        f"slope, us per 1,000 tokens of context: step {1e3 * line['step']:.0f}",
        f"its attention {1e3 * line['attention']:.0f}",
        f"predicted from KV bytes {_slope(line, 'predicted')}",
        f"of the read bound {_slope(line, 'bound')}",
    ]
    still = "" if line["predicted"] else " (no context makes them more: attention's windows are shorter)"
    return f"{', '.join(said)}{still}; no point is further than {100 * line['worst']:.1f}% from the line"


def _slope(line: Mapping[str, float], name: str) -> str:
    """A slope that the step's is held against; no ratio to what does not rise, or by noise alone."""
    ratio = f" (ratio {line['step'] / line[name]:.2f})" if min(line["predicted"], line[name]) > 0 else ""
    return f"{1e3 * line[name]:.0f}{ratio}"


def to_svg(result: Mapping[str, Any]) -> str:
    """A bar a step, all of one length: the shares of its parts, and lines at its bounds."""
    steps = [*result["steps"], *result["contexts"]]
    names = parts(steps)
    height = _TOP + len(steps) * (_BAR + _GAP) + 16
    drawn = [svg.text(16, 26, f"Where a step's time goes: {result['model_id']}, {result['variant']}", size=15)]
    drawn += _legend([*names, _REST])
    drawn += [svg.text(_WIDTH - 16, 26, "lines: the least time by what is read and multiplied", anchor="end")]
    for i, step in enumerate(steps):
        drawn += _bar(step, names, _TOP + i * (_BAR + _GAP))
    return svg.document(_WIDTH, height, drawn)


def _legend(names: Sequence[str]) -> list[str]:
    drawn, left, top = [], 16.0, 48.0
    for i, name in enumerate(names):
        width = 26 + 6.6 * len(name)
        if left + width > _WIDTH:
            left, top = 16.0, top + 18
        drawn += [f'<rect x="{left:.1f}" y="{top - 10:.1f}" width="11" height="11" fill="{_colour(i, names)}"/>']
        drawn += [svg.text(left + 15, top, name)]
        left += width
    return drawn


def _colour(index: int, names: Sequence[str]) -> str:
    return _COLOURS[-1] if index == len(names) - 1 else _COLOURS[index % (len(_COLOURS) - 1)]


def _bar(step: Step, names: Sequence[str], top: float) -> list[str]:
    width = _WIDTH - _LEFT - _RIGHT
    times = [*(step["parts"].get(name, 0.0) for name in names), max(0.0, rest(step, names))]
    whole = max(sum(times), step["step"])
    drawn, left = [svg.text(_LEFT - 8, top + 16, step["name"], anchor="end")], float(_LEFT)
    for i, (name, time) in enumerate(zip([*names, _REST], times, strict=True)):
        size = time / whole * width
        at = f'x="{left:.1f}" y="{top:.1f}" width="{size:.1f}" height="{_BAR}"'
        tip = escape(f"{name}: {share(step, time)} us")
        drawn += [f'<rect {at} fill="{_colour(i, [*names, _REST])}"><title>{tip}</title></rect>']
        if time / whole >= _MIN_SHARE_WITH_WORD:
            drawn += [svg.text(left + size / 2, top + 16, f"{100 * time / whole:.0f}%", size=11, anchor="middle")]
        left += size
    for name, time in step["bound"].items():
        x = _LEFT + min(1.0, time / whole) * width
        drawn += [f'<line x1="{x:.1f}" y1="{top - 4:.1f}" x2="{x:.1f}" y2="{top + _BAR + 4:.1f}" stroke="black"/>']
        drawn += [svg.text(x, top + _BAR + 15, name, size=10, anchor="middle")]
    return [*drawn, svg.text(_LEFT + width + 8, top + 16, f"{step['step']:,.0f} us")]
