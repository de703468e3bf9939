"""Templates that would take forever or all memory are stopped; what a conversation needs is far from the limits."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from llmctl.errors import RequestError
from llmctl.text import template_budget
from llmctl.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "x"}]
NAMESPACE = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx', l=[1], t=(1, 2), d={}) %}"
VARARGS = "{{ f(ns.t, ns.t) }}{% endfor %}{{ {ns.t: 1} }}"
TIMES = "{% for i in range(60) %}"


def repeated(statement: str, show: str = "") -> str:
    return NAMESPACE + TIMES + "{% set " + statement + " %}{% endfor %}" + show


def renamed(template: str, count: int = 60) -> str:
    """Statements in a row, each of the name before it."""
    return "{% set a0 = 'xx' %}" + "".join(template.format(i, i + 1) for i in range(count))


ENDLESS = [
    "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}{% endfor %}{% endfor %}",
    "{% for a in [range(90000)] * 90 recursive %}{% if a is not number %}{{ loop(a) }}{% endif %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    TIMES + "{% for j in range(100000) %}{{ range(100000) | sum }}{% endfor %}{% endfor %}",
    TIMES + "{% for j in range(9999) %}{{ range(100000) | map('string') | join | length }}{% endfor %}{% endfor %}",
    TIMES + "{% for j in range(9999) %}{{ range(90000) | select('equalto', 'x') | list }}{% endfor %}{% endfor %}",
]
GROWING = [
    repeated("ns.s = ns.s + ns.s"),
    repeated("ns.s = ns.s ~ ns.s"),
    repeated("ns.s = (ns.s, ns.s) | join"),
    repeated("ns.s = [ns.s, ns.s] | join('')"),
    repeated("ns.s = ''.join([ns.s, ns.s])"),
    repeated("ns.s = ns.s * 2"),
    repeated("ns.s = 2 * ns.s"),
    repeated("ns.s = ns.s | replace('x', 'xx')"),
    repeated("ns.s = ns.s.replace('x', 'xx')"),
    repeated("ns.s = '%s%s' % (ns.s, ns.s)"),
    repeated("ns.s = '%s%s' | format(ns.s, ns.s)"),
    repeated("ns.s = '{0}{0}'.format(ns.s)"),
    repeated("ns.s = '{a}{a}'.format_map({'a': ns.s})"),
    repeated("ns.l = ns.l + ns.l"),
    repeated("ns.l = ns.l * 2"),
    repeated("ns.l = [ns.l[0] ~ 'x' ~ ns.l[0]]"),
    repeated("ns.d = dict(a=(ns.d.a or 'x') + (ns.d.a or 'x'))"),
    repeated("ns.d = {'a': (ns.d.a or 'x') + (ns.d.a or 'x')}"),
    repeated("ns.d = namespace(a=(ns.d.a or 'x') + (ns.d.a or 'x'))"),
    repeated("ns.l = [ns.l, ns.l]", "{{ ns.l }}"),
    repeated("ns.l = [ns.l, ns.l]", "{{ ns.l | tojson }}"),
    repeated("ns.l = [ns.l, ns.l]", "{{ ns.l | string }}"),
    repeated("ns.l = [ns.l, ns.l]", "{{ ns.l ~ '' }}"),
    repeated("ns.l = [ns.l, ns.l]", "{{ '%s' % [ns.l] }}"),
    repeated("ns.l = [ns.l, ns.l]", "{{ '{}'.format(ns.l) }}"),
    repeated("ns.d = {'a': ns.d, 'b': ns.d}", "{{ ns.d }}"),
    repeated("ns.l = [ns.l, ns.l] %}{% set ns.d = [ns.d, ns.d]", "{{ ns.l == ns.d }}"),
    repeated("ns.l = [ns.l, ns.l] %}{% set ns.d = [ns.d, ns.d]", "{{ ns.l is eq(ns.d) }}"),
    repeated("ns.t = (ns.t, ns.t)", "{{ {ns.t: 1} }}"),
    NAMESPACE + "{% macro f() %}{% set ns.t = varargs %}{% endmacro %}" + TIMES + VARARGS,
    renamed("{{% set a{1} = a{0} + a{0} %}}"),
    renamed("{{% set a{1} = a{0} ~ a{0} %}}"),
    renamed("{{% set a{1} %}}{{{{ a{0} }}}}{{{{ a{0} }}}}{{% endset %}}"),
    renamed("{{% with a{1} = a{0} + a{0} %}}") + "{% endwith %}" * 60,
    "{% macro f(a0='xx', " + ", ".join(f"a{i + 1}=a{i} + a{i}" for i in range(60)) + ") %}{% endmacro %}{{ f() }}",
    "{% macro f(s, n) %}{% if n %}{{ f(s + s, n - 1) }}{% endif %}{% endmacro %}{{ f('xx', 60) }}",
    "{% set s = 'x' * 8000000 %}{{ (" + " + ".join(["s"] * 40) + ") | length }}",
    "{% set s = 'x' * 8000000 %}{{ (" + " ~ ".join(["s"] * 40) + ") | length }}",
    "{{ 'x' * 10**10 }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.zfill(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ ['x'] | batch(10**10, 'x') | list }}",
    "{{ ['x'] | slice(10**10) | list }}",
    "{{ 'x\n' * 100000 | indent(10**10) }}",
    "{{ messages | tojson(indent=10**10) }}",
    "{{ 1.5 | round(10**10, 'ceil') }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set ns = namespace(n=9) %}" + TIMES + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(9) %}" + "y" * 5000 + "{% endfor %}{% endfor %}",
    "{% macro f() %}" + "y" * 50000 + "{% endmacro %}{% for i in range(100000) %}{{ f() }}{% endfor %}",
    "{% set s = 'x' * 1000000 %}{% for i in range(100000) %}{{ s }}{% endfor %}",
    "{% set s = 'x' * 1000000 %}{% for i in range(100000) %}{{ s | trim | length }}{% endfor %}",
    "{% set s = 'x' * 1000000 %}{{ ([s] * 100000) | join | length }}",
    "{% set s = 'x' * 1000000 %}{{ range(100000) | join(s) | length }}",
    "{% set s = 'x' * 1000000 %}{{ s.join(['x'] * 100000) | length }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS + GROWING)
def test_a_template_that_does_too_much_is_a_named_400(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 100_000)
    with pytest.raises(RequestError, match=r"^chat template: it (took|made|asked)") as caught:
        ChatTemplate(source).render(MESSAGES)
    assert caught.value.http_status == 400
    assert "another with --chat-template" in str(caught.value)


GONE = [
    "{{ lipsum() }}",
    "{{ (1).to_bytes(10**10) }}",
    "{{ 'x\t'.expandtabs(10**10) }}",
    "{{ 'x'.translate({120: 'y'}) }}",
]


@pytest.mark.parametrize("source", GONE)
def test_what_no_template_needs_is_not_there(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source).render(MESSAGES)


def test_a_long_conversation_is_far_from_the_limits() -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}{% endif %}"
        "{{ '<|' + m.role + '|>' }}{% set content = m.content | trim %}{{ content }}{{ loop.last ~ loop.length }}"
        "{% endfor %}"
    )
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a word " * 40, "tool_calls": [{"a": [1, {}]}]}
    ] * 8000
    assert len(ChatTemplate(source).render(messages)) > 8000 * 280
    assert template_budget.thread.budget.left > template_budget.MAX_STEPS * 0.6
    ChatTemplate(source).render([{"role": "user", "content": "x" * 4_000_000}])
    assert template_budget.thread.budget.left > template_budget.MAX_STEPS * 0.8


def test_each_rendering_and_each_thread_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 1500)
    template = ChatTemplate("{% for m in range(400) %}{{ m }}{% endfor %}")
    expected = "".join(map(str, range(400)))
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(template.render(MESSAGES))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*made, template.render(MESSAGES)] == [expected] * 9


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for x in [3, 1] %}{{ loop.index ~ loop.length ~ loop.last }}{{ loop.revindex }}{% endfor %}",
            "12False222True1",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}", "a1"),
        ("{% for x in none_such %}{{ x }}{% else %}none{% endfor %}", "none"),
        (
            "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is sequence else x }}{{ loop.depth }}{% endfor %}",
            "11223321",
        ),
        ("{% for x in 'ab' | map('upper') %}{{ x }}{{ loop.length }}{% endfor %}", "A2B2"),
        ("{{ 1 + 2 + 3 }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ none }}", "6[1, 2]a1None"),
        ("{% set a, b = (1, 2) %}{{ a }}{{ b }}{{ 7 % 3 }}{{ '%s-%d' % ('x', 5) }}{{ 2 ** 8 }}", "12" + "1x-5256"),
        ("{{ 'abc'[::-1] }}{{ messages[1:] }}{{ '{:>4}|{a}'.format('x', a=1) }}", "cba[]   x|1"),
        ("{{ ','.join(['a', 'b']) }}{{ ['a', 'b'] | join(', ') }}{{ 'aa' | replace('a', 'b') }}", "a,ba, bbb"),
        ("{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | list }}{{ [2, 1] | sort | first }}", "[1, 2]1"),
    ],
)
def test_what_is_counted_is_as_it_was(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(MESSAGES) == expected
    assert json.dumps(MESSAGES) == '[{"role": "user", "content": "x"}]'
