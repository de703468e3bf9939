"""Chat templates against transformers' own rendering, and the sandbox against templates that mean harm."""

from __future__ import annotations

from pathlib import PosixPath
from typing import Any

import pytest
from small_tokenizers import byte_level_backend

from llmctl.errors import CheckpointError, RequestError
from llmctl.text.chat_template import ChatTemplate

CHATML = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
        {{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}
    {% endif %}
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("Unknown role: " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(last=0, seen=[]) %}
{%- for message in messages %}
    {%- set ns.last = loop.index %}
    {%- if message.role == "tool" and loop.index0 == 0 %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + ' ' ~ ns.last }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
    {{- '<|im_end|>\n' }}
    {%- if loop.index > 20 %}{%- break %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
{%- endif %}"""

GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
{{ m.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ dict(a=m.content)['a'] }}{% endif %}{% endfor %}"""

CHAT = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Hi <b>& 你好 😀</b>\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "What's 2 + 2?"},
]
CALLS = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": {"city": "Köln", "n": [1, 2.5]}}}],
    },
    {"role": "tool", "content": "rain"},
]
TOOLS = [{"type": "function", "function": {"name": "get", "description": "a <b> & 'c'", "parameters": {"x": None}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def peer() -> Any:
    """transformers' tokenizer, which renders templates."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), **TOKENS)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("source", "messages", "tools", "extra"),
    [
        (CHATML, CHAT, None, {}),
        (CHATML, CHAT[1:], None, {}),
        (LLAMA3, CHAT, None, {}),
        (LLAMA3, CHAT[1:], TOOLS, {"date_string": "26 Jul 2024"}),
        (QWEN, CHAT, None, {}),
        (QWEN, CALLS, TOOLS, {"enable_thinking": False}),
        (QWEN, CALLS[2:], None, {}),
        (GENERATION, CHAT[1:], None, {}),
    ],
)
def test_renders_as_transformers_does(
    peer: Any,
    source: str,
    messages: list[Any],
    tools: list[Any] | None,
    extra: dict[str, Any],
    add_generation_prompt: bool,
) -> None:
    expected = peer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **extra,
    )
    made = ChatTemplate(source, TOKENS).render(messages, add_generation_prompt, tools, **extra)
    assert made == expected
    assert len(made) > 10 or source is QWEN


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(RequestError, match="chat template: Unknown role: robot") as caught:
        ChatTemplate(LLAMA3, TOKENS).render([{"role": "robot", "content": "x"}])
    assert caught.value.http_status == 400
    assert caught.value.param == "messages"


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"role": "user", "content": None}], [{}], [{"role": 1}]])
def test_messages_that_a_template_fails_on_are_a_request_error(messages: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"^chat template: ") as caught:
        ChatTemplate(CHATML).render(messages)
    assert "\n" not in str(caught.value)


def test_only_plain_data_reaches_a_template() -> None:
    with pytest.raises(RequestError, match="expected JSON data, found PosixPath"):
        ChatTemplate("x").render([{"role": "user", "content": PosixPath()}])


def test_broken_source_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(CheckpointError, match="chat template: line 2: "):
        ChatTemplate("a\n{% for %}")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['datetime'] }}",
    "{{ strftime_now.__globals__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ dict.__class__.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__class__}'|attr('format'))('') }}",
    "{{ [''] | map('attr', '__class__') | map(attribute='__mro__') | list }}",
    "{% set ns = namespace(__class__='x') %}{{ ns.__class__ }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
    "{{ lipsum.__globals__['os'] }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ range(1000000000) | list }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_malicious_template_does_not_escape(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    try:
        made = ChatTemplate(source, TOKENS).render(messages)
    except RequestError:
        pass
    else:
        assert made == "", "an attribute the sandbox hides renders as nothing"
    assert messages == [{"role": "user", "content": "x"}]


def test_what_a_template_changes_stays_in_it() -> None:
    template = ChatTemplate("{% set messages = messages + [1] %}{{ messages | length }}")
    messages: list[Any] = [{"role": "user", "content": "x"}]
    assert [template.render(messages), template.render(messages)] == ["2", "2"]
    assert len(messages) == 1


@pytest.mark.parametrize("depth", [30, 150, 400, 3_000, 100_000])
@pytest.mark.parametrize(
    ("opening", "inner", "closing"),
    [
        ("{% if true %}", "x", "{% endif %}"),
        ("{% for i in [1] %}", "x", "{% endfor %}"),
        ("{% filter trim %}", "x", "{% endfilter %}"),
        ("(", "1", ")"),
        ("[", "1", "][0]"),
    ],
)
def test_a_deeply_nested_template_works_or_is_refused_in_one_line(
    opening: str, inner: str, closing: str, depth: int
) -> None:
    nested = opening * depth + inner + closing * depth
    source = nested if opening.startswith("{%") else "{{ " + nested + " }}"
    try:
        said = ChatTemplate(source).render([])
    except (CheckpointError, RequestError) as error:
        said = str(error)
    assert said == inner or (said.startswith("chat template: ") and "\n" not in said)
    assert said == inner or depth > 30 or opening.startswith("{% for")
