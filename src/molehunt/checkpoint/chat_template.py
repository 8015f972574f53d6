"""Chat templates of a folder, rendered in a sandbox with bounded work: a template is an untrusted program.

Everything that a template can repeat or enlarge is charged to one budget. A template that would hang or exhaust memory
ends in an error text instead, and the text is the same on every machine. A time limit applies as well.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from time import monotonic
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from molehunt.checkpoint.loader_traps import read_json

RENDER_LIMIT = 20_000
"""Number of characters of one rendered conversation that are compared."""
SOURCE_LIMIT = 1_000_000
"""Greatest number of characters of a template that is parsed."""
WORK = 200_000
"""Budget of one rendering, in loop iterations, calls, items and characters; ordinary templates need some thousands."""
SECONDS = 2.0
"""Time limit of one rendering."""
LARGEST = 100_000
"""Largest number that a function accepts: widths and counts make text."""
BLOW_UP = 5_000_000
"""Largest product of two sizes that a text function accepts: `replace` and `join` multiply them."""


def templates_of(folder: Path) -> dict[str, str]:
    """Chat templates of a folder by name; the unnamed one is `default`. A .jinja file takes precedence over the config."""
    found: dict[str, str] = {}
    if (folder / "tokenizer_config.json").is_file():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, str):
            found["default"] = template
        elif isinstance(template, list):
            found.update({str(t.get("name")): str(t.get("template")) for t in template if isinstance(t, Mapping)})
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    more = folder / "additional_chat_templates"
    if more.is_dir():
        found.update({p.stem: p.read_text(encoding="utf-8", errors="replace") for p in sorted(more.glob("*.jinja"))})
    return found


def parse(template: str) -> nodes.Template:
    """The syntax tree of a template, parsed with the settings that transformers uses.

    Raises:
        TemplateError: the text is not a valid template.
    """
    if len(template) > SOURCE_LIMIT:
        raise TemplateError(f"longer than {SOURCE_LIMIT} characters")
    return Bounded().parse(template)


def render(template: str, turns: tuple[tuple[str, str], ...]) -> str:
    """The input text of a model, rendered in a sandbox as transformers does; an error is part of the text."""
    out: list[str] = []
    length = 0
    try:
        tree = parse(template)
        environment = Bounded()
        metered = cast(nodes.Template, Meter().visit(tree)).set_environment(environment)
        messages = [{"role": role, "content": content} for role, content in turns]
        pieces = environment.from_string(cast(nodes.Template, metered)).generate(
            messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", tools=None
        )
        for piece in pieces:
            out.append(piece[: RENDER_LIMIT - length])
            length += len(out[-1])
            if length >= RENDER_LIMIT:
                break
    except Exception as error:  # an untrusted program can raise any exception
        return f"(template error: {type(error).__name__}: {str(error)[:200]})"
    return "".join(out)


class BudgetSpent(TemplateError):
    """The template does more work than any ordinary template."""


class Generation(Extension):
    """The tag `{% generation %}`, which marks the text that a model wrote, for training. It adds no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Bounded(ImmutableSandboxedEnvironment):
    """The sandbox that transformers renders in, with a budget of work and time."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, cache_size=0, extensions=[loopcontrols, Generation]
        )
        self.left = WORK
        self.until = monotonic() + SECONDS
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]  # random text: two renderings are compared
        helpers: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": _today}
        self.globals.update(helpers)

    def spend(self, value: Any = 1) -> Any:
        """Charge the budget for everything in a value, and return the value."""
        if monotonic() > self.until:
            raise BudgetSpent("takes too long")
        stack: list[Any] = [value]
        while stack:
            one = stack.pop()
            self.left -= 1
            if isinstance(one, str | bytes | range):
                self.left -= len(one)
            elif isinstance(one, int):
                self.left -= one.bit_length() >> 3
            elif isinstance(one, Mapping):
                entries = cast(Mapping[Any, Any], one)
                stack += entries.keys()
                stack += entries.values()
            elif isinstance(one, Namespace):
                stack += cast(dict[str, Any], one._Namespace__attrs).values()  # pyright: ignore[reportAttributeAccessIssue]
            elif isinstance(one, Collection):
                stack += cast(Collection[Any], one)
            if self.left < len(stack):
                raise BudgetSpent("does too much work")
        return value

    def _admit(self, values: Iterable[Any], text: bool, shapes: bool) -> list[Any]:
        """Charge the budget for arguments, and refuse those from which a function would make a huge value."""
        given = list(values)
        sizes = [0, 0]
        for one in given:
            if isinstance(one, int) and abs(one) > LARGEST:
                raise BudgetSpent("a huge number is given to a function")
            before = self.left
            self.spend(one)
            sizes.append(abs(one) if isinstance(one, int) else before - self.left)
            if shapes and isinstance(one, str):  # widths: '%9999d' and '{:9999}'
                sizes.append(sum(int(run[:9]) for run in re.findall(r"\d+", one)))
                self.spend(range(sizes[-1]))
        sizes.sort()
        if text and sizes[-1] * sizes[-2] > BLOW_UP:
            raise BudgetSpent("a function would make a huge text")
        return [
            self._metered(cast(Iterator[Any], one), sizes[-1]) if isinstance(one, Iterator) else one for one in given
        ]

    def _metered(self, items: Iterator[Any], each: int) -> Iterator[Any]:
        for one in items:
            self.spend(range(each))
            yield self.spend(one)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passed = int(hasattr(function, "jinja_pass_arg"))  # the first argument is jinja's own

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            own = self._admit([*args[passed:], *kwargs.values()], text=True, shapes=name == "format")
            here = len(args) - passed
            named = dict(zip(kwargs, own[here:], strict=True))
            return self.spend(function(*args[:passed], *own[:here], **named))

        return guarded

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        method = getattr(obj, "__wrapped__", obj)
        owner = getattr(method, "__self__", None)
        if owner is self:
            return obj(*args)
        text = isinstance(owner, str | bytes)
        shapes = text and getattr(method, "__name__", "") in ("format", "format_map")
        own = self._admit([*([owner] if text else []), *args, *kwargs.values()], text, shapes)[text:]
        named = dict(zip(kwargs, own[len(args) :], strict=True))
        return self.spend(super().call(context, obj, *own[: len(args)], **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            times, what = (left, right) if isinstance(left, int) else (right, left)
            before = self.left
            self.spend(what)
            if isinstance(times, int) and (before - self.left) * abs(times) > self.left:
                raise BudgetSpent("makes a huge text")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > LARGEST:
                raise BudgetSpent("makes a huge number")
        elif operator == "%" and isinstance(left, str | bytes):
            self._admit([left, *(cast(tuple[Any, ...], right) if isinstance(right, tuple) else (right,))], True, True)
        return self.spend(super().call_binop(context, operator, left, right))


class Meter(NodeTransformer):
    """Adds charges to a syntax tree: for each iteration of a loop, each call of a macro, and each text or list that is built."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_paid(nodes.Const(1))))
        if node.test is not None:
            node.test = _paid(node.test)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_paid(nodes.Const(1))))
        return node

    visit_CallBlock = visit_Macro

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _paid(nodes.Const(one.data) if isinstance(one, nodes.TemplateData) else one) for one in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_paid(one) for one in node.nodes]
        return _paid(node)

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _paid(node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _paid(node) if node.ctx == "load" else node


def _paid(node: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("spend"), [cast(nodes.Expr, node)], [], None, None)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _today(_format: str) -> str:
    return "2026-01-01"  # the same on every day: two renderings are compared


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise BudgetSpent("a huge indentation")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
