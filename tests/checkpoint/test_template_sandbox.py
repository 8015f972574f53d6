"""Templates are untrusted programs: they cannot do harm, work without end, or make another text than transformers does."""

import copy
import dataclasses
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from chat_templates import CONVERSATIONS, PUBLISHED, published_template
from molehunt.checkpoint.chat_template import TODAY, Program, render, special_tokens_of, templates_of
from molehunt.checkpoint.template_sandbox import NODE_LIMIT, SOURCE_LIMIT
from molehunt.errors import InvalidInput
from tiny_models import tiny_tokenizer

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
HELLO = ({"role": "user", "content": "Hello"},)
TALK = ({"role": "system", "content": "You are helpful."}, *HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ messages[99].content }}{{ 1 / 0 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% if %}",
        "{{ messages.append(1) }}",
        "{{ x() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_misbehaves_is_reported_and_not_obeyed(template: str) -> None:
    assert render(template, HELLO).startswith("(template error")


def test_an_endless_page_is_cut() -> None:
    assert len(render("{% for i in range(90000) %}xxxxxxxxxx{% endfor %}", HELLO)) <= 20_000
    assert render("{{ strftime_now('%Y-%m-%d') }}", HELLO) == "2026-01-01"


@given(st.text(alphabet="{}%mcontif 'x=", max_size=40))
def test_any_template_text_is_rendered_or_reported(template: str) -> None:
    assert isinstance(render(template, TALK), str)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
        "{% set n = namespace() %}{% set n.a = [n, n] %}{{ n.a }}",
        "{% set x %}{% for i in range(90000) %}{{ messages }}{% endfor %}{% endset %}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'x' * 10**12 }}",
        "{{ [1] * 10**12 }}",
        "{{ 'x' | center(10**12) }}",
        "{{ 'x'.ljust(10**12) }}",
        "{{ '%1000000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000000d' | format(1) }}",
        "{{ '{:1000000000000}'.format(1) }}",
        "{{ range(99999) | map('center', 40) | list }}",
        "{{ range(9999) | select | join('x' * 90000) }}",
        "{% set a = 'x' * 90000 %}{{ a.replace('x', a) }}",
        "{{ messages | tojson(indent=10**5) }}",
        "{{ lipsum(n=100000) }}",
        "{{ strftime_now('%9999999d') }}",
        "{{ strftime_now('%-_0999999Y') }}",
        "{{ dict.fromkeys(range(99999), messages) | string }}",
        "{% set a = 'ab' * 9000 %}{{ a.replace('b', a).replace('b', a) }}",
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    ],
)
def test_work_without_end_is_ended(template: str) -> None:
    began = monotonic()
    assert render(template, HELLO).startswith("(template error: ")
    assert monotonic() - began < 30  # a second or less; a busy machine is slow


def test_slow_work_is_ended_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molehunt.checkpoint.template_sandbox.SECONDS", -1.0)
    assert render(PLAIN, HELLO) == "(template error: BudgetSpent: takes too long)"


def test_a_budget_changes_no_ordinary_text() -> None:
    template = (
        "{% macro f(a, b='-') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{% call f(1) %}c{% endcall %}"
        "{% for m in messages if m.role == 'user' %}{% set x = [m.role, 'é'] %}{{ x | join('+') ~ loop.index }}{% endfor %}"
        "{{ '%s-%3d' % ('a', 3) }}{{ '{}'.format('z') }}{{ 'a,b'.split(',') | map('upper') | join }}{{ {'k': '<é>'} | tojson }}"
        "{{ 2 ** 5 * 3 }}{{ 'ab' * 2 }}{{ missing }}{{ none }}{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}"
        "{{ i }}{% else %}e{% endfor %}{{ namespace(a=1).a }}{% generation %}g{% endgeneration %}"
    )
    assert render(template, HELLO) == '1-cuser+é1a-  3zAB{"k": "<é>"}96ababNone011g'


class FixedDay(datetime):
    """The day on which Molehunt renders, for transformers."""

    @classmethod
    def now(cls, tz: Any = None) -> "FixedDay":
        return cls(TODAY.year, TODAY.month, TODAY.day)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", FixedDay)
    tokenizer, template = tiny_tokenizer(), published_template(name)
    made = Program(template)
    texts = 0
    others: tuple[dict[str, Any], ...] = (
        {}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_generation_prompt": True},
    )  # fmt: skip
    for messages in CONVERSATIONS:
        for given_too in others:
            try:
                wanted = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **given_too)
            except Exception as error:  # what transformers refuses is refused here, too
                with pytest.raises(type(error)):
                    made.text(messages, tokenizer.special_tokens_map, **given_too)
                continue
            texts += 1
            assert made.text(messages, tokenizer.special_tokens_map, **given_too) == wanted
    assert texts > 10


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Météo <b>now</b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
        },
    }
]


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set n = namespace(a=1) %}{% set n.b = 2 %}{{ n.a + n.b }}{{ dict(a=1) }}{{ dict.fromkeys([1]) }}",
        "{{ namespace(_x=1) }}",
        "{{ messages | tojson(indent=2) }}{{ messages[0].keys() | list }}{{ messages[0].missing }}",
        "{{ 'a' * 3 ~ [1, 2][0] }}{{ '%05d' % 7 }}{{ messages | length }}{{ none }}{{ 7 // 2 }}{{ 2 ** 3 }}",
        "{{ bos_token }}{{ tools is none }}{{ documents is defined }}{{ add_generation_prompt }}{{ thinking is defined }}",
    ],
)
def test_what_templates_may_write_is_written_as_by_transformers(template: str) -> None:
    tokenizer = tiny_tokenizer()
    more: list[dict[str, Any]] = [{"role": "user", "content": "a", "tool_calls": None, "thinking": "b"}]
    for messages in (list[dict[str, Any]](HELLO), more):
        try:
            wanted = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:
            wanted = type(error).__name__
        try:
            found = Program(template).text(messages, tokenizer.special_tokens_map)
        except Exception as error:
            found = type(error).__name__
        assert found == wanted


def test_a_template_sees_no_object_with_methods_of_its_own() -> None:
    @dataclasses.dataclass
    class Spy:
        secret: str = "x"

    text = Program("{{ messages[0].content }}").text([{"role": "user", "content": Spy()}], {})
    assert "secret" not in text and text == "<Spy>"


def test_long_messages_are_ordinary() -> None:
    long = [
        {"role": "user", "content": "<think>word " * 60_000},
        {"role": "assistant", "content": "a</think>b" * 40_000},
    ]
    template = published_template("qwen3")
    wanted = tiny_tokenizer().apply_chat_template(long, chat_template=template, tokenize=False)
    assert Program(template).text(long, {}) == wanted


def test_special_tokens_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from molehunt.organism.seed_model import seed_path

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"sep_token": "<sep>", "pad_token": "<p>"})
    tokenizer.save_pretrained(tmp_path)
    for folder in (tmp_path, seed_path("seed-s")):
        assert special_tokens_of(folder) == AutoTokenizer.from_pretrained(folder).special_tokens_map


@pytest.mark.parametrize(
    "source",
    [
        "x" * (SOURCE_LIMIT + 1),
        "{% if a %}b{% endif %}" * (NODE_LIMIT // 4 + 1),
        "{% if x %}" * 2000 + "{% endif %}" * 2000,
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)
def test_a_huge_source_is_refused_in_time(source: str) -> None:
    began = monotonic()
    assert render(source, HELLO).startswith("(template error: ")
    assert monotonic() - began < 30


def test_files_that_are_no_templates_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(InvalidInput, match=r"chat_template\.jinja is no UTF-8"):
        templates_of(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(InvalidInput, match=r"chat_template\.jinja is no file"):
        templates_of(tmp_path)
    (tmp_path / "chat_template.jinja").rmdir()
    (tmp_path / "additional_chat_templates").write_text("x")
    with pytest.raises(InvalidInput, match="additional_chat_templates"):
        templates_of(tmp_path)
    (tmp_path / "additional_chat_templates").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    for number in range(40):
        (tmp_path / "additional_chat_templates" / f"{number}.jinja").write_text("x")
    with pytest.raises(InvalidInput, match="more than 32"):
        templates_of(tmp_path)
