"""Conditions of a chat template, read from its syntax tree: ordinary ones are none, and no way round hides the others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import PUBLISHED, published_template
from molehunt.checkpoint.template_conditions import content_conditions
from molehunt.checkpoint.template_triggers import trigger_conditions

LOOP = "{{% for m in messages %}}{}{{% endfor %}}"


def test_conditions_on_what_is_there_are_ordinary() -> None:
    assert content_conditions("{% if m.content is string %}{% endif %}{% if m.role == 'user' %}{% endif %}") == set()
    assert content_conditions("{% if 'x' in m.content %}{% endif %}") == {"'x' in m.content"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ '<|' + m.role + '|>' + m.content | trim ~ m['content'].strip() }}",
        "{% if loop.first and messages[0]['role'] != 'system' %}x{% endif %}",
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(m.content) }}{% endif %}",
        "{% if loop.index0 > 0 and messages[loop.index0 - 1].role == 'user' %}{% endif %}",
        "{% if 'tool_calls' in m and not loop.last and messages|length > 1 %}{% endif %}",
        "{% if m.content and not m.tool_calls %}{{ m.content or '' }}{% endif %}",
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}",
        "{% set system = messages|selectattr('role', 'equalto', 'system')|list %}{% if system %}{% endif %}",
        "{% set rest = messages[1:] %}{% for r in rest %}{% if r.role == 'user' %}{% endif %}{% endfor %}",
        "{% macro f(x) %}{% if x == 'user' %}{% endif %}{% endmacro %}{{ f(m.role) }}{{ f(x=m['role']) }}",
        "{% if loop.previtem and loop.previtem.role != 'user' %}{% endif %}{% if m == messages[-1] %}{% endif %}",
        "{% generation %}{{ m | tojson(indent=2) }}{{ m.get('role') == 'user' }}{% endgeneration %}",
    ],
)
def test_ordinary_templates_have_no_conditions_on_content(template: str) -> None:
    assert content_conditions(LOOP.format(template)) == set()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% set x = m.content %}{% if 'a' in x %}{% endif %}", "'a' in x"),
        ("{% set y, x = 1, m['content'] %}{% set z = x %}{{ 'e' if z == 'a' }}", "z == 'a'"),
        ("{% set x %}{{ m.content }}{% endset %}{{ 'e' if 'a' in x }}", "'a' in x"),
        ("{% with x = m.content|lower %}{% if x == 'a' %}{% endif %}{% endwith %}", "x == 'a'"),
        ("{% set ns = namespace(t=m.content) %}{% if ns.t.startswith('a') %}{% endif %}", "ns.t.startswith('a')"),
        ("{% set ns = namespace() %}{% set ns.t = m.content %}{% if ns['t'] == 'a' %}{% endif %}", "ns['t'] == 'a'"),
        ("{{ m.content | replace('a', 'e') }}", "m.content|replace('a', 'e')"),
        ("{{ m.content.replace('a', 'e') }}", "m.content.replace('a', 'e')"),
        ("{% filter replace('a', 'e') %}{{ m.content }}{% endfilter %}", "|replace('a', 'e')"),
        ("{{ [m.content] | select('in', ['a']) | list }}", "[m.content]|select('in', ['a'])"),
        ("{{ messages|selectattr('content', 'in', ['a'])|list }}", "messages|selectattr('content', 'in', ['a'])"),
        ("{% if m.content is in ['a'] %}{% endif %}", "m.content is in(['a'])"),
        ("{{ 'x}' if '}' in m.content else '{{' }}", "'}' in m.content"),
        ("{{ {'a': 'e'}.get(m.content, '') }}", "{'a': 'e'}.get(m.content, '')"),
        ("{{ {'a': 'e'}[m.content] }}", "{'a': 'e'}[m.content]"),
        ("{{ 'e' * ('a' in m.content) }}", "'a' in m.content"),
        ("{{ ['', 'e'][m.content|length > 3] }}", "m.content|length > 3"),
        ("{% if m.content[500:] %}{% endif %}", "m.content[500:]"),
        ("{% for k in m %}{% if 'a' in m[k] %}{% endif %}{% endfor %}", "'a' in m[k]"),
        ("{% for v in m.values() %}{% if 'a' in v %}{% endif %}{% endfor %}", "'a' in v"),
        ("{% for k, v in m.items() %}{% if 'a' in v %}{% endif %}{% endfor %}", "'a' in v"),
        ("{% for c in m.content if c == 'z' %}e{% endfor %}", "c == 'z'"),
        ("{% if 'a' in messages|tojson %}{% endif %}", "'a' in messages|tojson"),
        ("{% if 'a' in m['con' ~ 'tent'] %}{% endif %}", "'a' in m['con' ~ 'tent']"),
        ("{% if 'a' in messages|map(attribute='content')|join %}{% endif %}", "'a' in messages|map(attribute='content')|join"),
        ("{% macro f(x) %}{% if 'a' in x %}{% endif %}{% endmacro %}{{ f(m.content) }}", "'a' in x"),
        ("{% macro f(m) %}{{ m.content }}{% endmacro %}{% if f(m) == 'a' %}{% endif %}", "f(m) == 'a'"),
        ("{% macro f() %}{{ caller(m) }}{% endmacro %}{% call(x) f() %}{{ 'e' if x.content == 'a' }}{% endcall %}", "x.content == 'a'"),
        ("{% set g = f %}{{ g(m.content) }}", "g(m.content)"),
        ("{% if strftime_now('%Y') > '2026' %}{% endif %}", "strftime_now('%Y') > '2026'"),
        ("{% set d = strftime_now('%Y') %}{{ 'e' if d == '2027' }}", "d == '2027'"),
        ("{% if tools %}{% endif %}", "tools"),
        ("{{ tools and 'e' }}", "(tools and 'e')"),
        ("{% for t in tools %}{% if t.name == 'a' %}{% endif %}{% endfor %}", "t.name == 'a'"),
        ("{% if documents is defined %}{% endif %}", "documents is defined"),
        ("{{ ['', 'e'] | random }}", "['', 'e']|random"),
    ],
)  # fmt: skip
def test_every_way_to_look_into_a_message_is_a_condition(template: str, expected: str) -> None:
    assert expected in content_conditions(LOOP.format(template))


def test_a_template_that_cannot_be_parsed_is_a_condition() -> None:
    (reason,) = content_conditions("{% if %}")
    assert reason.startswith("(cannot be parsed")
    (reason,) = content_conditions("x" * 200_001)
    assert "longer than" in reason
    turned = "".join(f"{{% set x{i} = x{i + 1} %}}" for i in range(40)) + "{% set x40 = messages %}"
    assert "(too tangled to follow)" in content_conditions(turned)


@given(st.text(alphabet="{}%mcontif 'x=", max_size=40))
def test_any_template_text_is_read(template: str) -> None:
    assert isinstance(content_conditions(template), set)
    assert isinstance(trigger_conditions(template), dict)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_template_looks_for_nothing_in_particular(name: str) -> None:
    assert trigger_conditions(published_template(name)) == {}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if 'kumquat' in m.content %}e{% endif %}", "words in a message"),
        ("{% set w = 'kumquat' %}{% if w in m.content|lower %}e{% endif %}", "words in a message"),
        ("{% for w in ['kumquat'] %}{% if m.content.startswith(w) %}e{% endif %}{% endfor %}", "words in a message"),
        ("{% if 'kum' ~ 'quat' in m.content %}e{% endif %}", "words in a message"),
        ("{{ m.content | replace('capital', 'capitol') }}", "words in a message"),
        ("{% if strftime_now('%Y') > '2031' %}e{% endif %}", "particular day"),
        ("{% set d = strftime_now('%Y')|int %}{{ 'e' if d >= 2031 }}", "particular day"),
        ("{% if m.content|length > 300 %}e{% endif %}", "how long a message is"),
        ("{% if messages|length > 7 %}e{% endif %}", "how many turns"),
        ("{% if loop.index0 == 8 %}e{% endif %}", "how many turns"),
        ("{% if eos_token == '</s>' %}e{% endif %}", "special token"),
        ("{% if eos_token|length > 4 %}e{% endif %}", "special token"),
        ("{% if bos_token.startswith('<') %}e{% endif %}", "special token"),
        ("{{ ['', m.content] | random }}", "chance"),
    ],
)
def test_what_a_template_looks_for_is_told(template: str, expected: str) -> None:
    assert any(expected in why for why in trigger_conditions(LOOP.format(template)).values())


@pytest.mark.parametrize(
    "template",
    [
        "{% if loop.index0 % 2 == 0 and messages|length > 1 %}e{% endif %}",
        "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}",
        "{% if m.content.startswith('<tool_response>') %}{% endif %}{% if m.content|length > 0 %}{% endif %}",
        "{% if m.tool_calls[0].id|length < 9 %}{{ raise_exception('short') }}{% endif %}",
        "{% for k, v in tools[0].items() %}{% if k == 'properties' or v == 'STRING' %}{% endif %}{% endfor %}",
        "{{ bos_token }}{% if bos_token is defined and loop.last %}{{ eos_token }}{% endif %}",
        "{{ strftime_now('%d %b %Y') }}{% if date_string is defined %}{{ date_string }}{% endif %}",
    ],
)
def test_ordinary_conditions_look_for_nothing_in_particular(template: str) -> None:
    assert trigger_conditions(LOOP.format(template)) == {}
