"""The sandbox in which every chat template runs: a template is an untrusted program.

Everything that a template can repeat or enlarge is charged to one budget. A template that would hang or exhaust memory
ends in an error instead, and the error is the same on every machine. A limit of processor time applies as well.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache, wraps
from time import thread_time
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SOURCE_LIMIT = 200_000
"""Greatest number of characters of a template that is parsed; the largest public ones have about 20,000."""
NODE_LIMIT = 20_000
"""Greatest number of nodes of a template's syntax tree; the largest public ones have about 5,000."""
WORK = 200_000
"""Budget of one rendering, in loop iterations, calls, items and characters; ordinary templates need some thousands."""
PER_CHARACTER = 60
"""How much each character of the messages adds to the budget: a template may look at long texts several times."""
SECONDS = 2.0
"""Limit of processor time of one rendering; each million characters of the messages adds as much."""
LARGEST = 100_000
"""Largest number that a function accepts: widths and counts make text."""
BLOW_UP = 5_000_000
"""Largest product of two sizes that a text function accepts: `replace` and `join` multiply them."""


SHRINKING = frozenset(
    {
        "replace", "split", "rsplit", "splitlines", "partition", "rpartition", "strip", "lstrip", "rstrip", "startswith",
        "endswith", "find", "rfind", "index", "rindex", "count", "removeprefix", "removesuffix",
    }
)  # fmt: skip
"""Methods of texts that make nothing longer than their input; `replace` is counted by itself."""


def parse(template: str) -> nodes.Template:
    """The syntax tree of a template, parsed with the settings that transformers uses.

    Raises:
        TemplateError: the text is not a valid template, or larger than any real one.
    """
    if len(template) > SOURCE_LIMIT:
        raise TemplateError(f"longer than {SOURCE_LIMIT} characters")
    tree = _parser().parse(template)
    stack: list[nodes.Node] = [tree]
    for number, node in enumerate(stack):  # grows while it is walked
        if number > NODE_LIMIT:
            raise TemplateError(f"more than {NODE_LIMIT} expressions")
        stack += node.iter_child_nodes()
    return tree


@cache
def _parser() -> "Bounded":
    return Bounded()


class BudgetSpent(TemplateError):
    """The template does more work than any ordinary template."""


class Generation(Extension):
    """The tag `{% generation %}`, which marks the text that a model wrote, for training. It adds no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a block of its own, as in transformers: what is set inside is not seen outside
        return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

    def written(self, caller: Callable[[], str]) -> str:
        """The text inside the block, as it is."""
        return caller()


class PlainNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class PlainDict:
    """The function `dict` of templates: nothing but a call and `fromkeys`, as in transformers."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class Bounded(ImmutableSandboxedEnvironment):
    """The sandbox that transformers renders in, with a budget of work and time."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    own_calls = frozenset({"spend"})
    """Methods of the sandbox that the syntax tree itself calls; a template cannot name them."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, cache_size=0, extensions=[loopcontrols, Generation]
        )
        self.dates: list[str] = []
        self.start(0, datetime(2026, 1, 1))
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]  # random text: two renderings are compared
        own: dict[str, Any] = {
            "raise_exception": _refuse,
            "strftime_now": self.strftime_now,
            "dict": PlainDict(),
            "namespace": PlainNamespace,
        }
        self.globals.update(own)

    def start(self, characters: int, today: datetime) -> None:
        """Begin a rendering of messages of so many characters, on a day.

        Its budget is fresh, and `dates` is empty: it collects every date that the template asks for.
        """
        self.left = WORK + PER_CHARACTER * characters
        self.blow_up = max(BLOW_UP, PER_CHARACTER * characters)
        self.until = thread_time() + SECONDS * (1 + characters / 1e6)
        self.today = today
        self.dates.clear()

    def strftime_now(self, shape: object) -> str:
        """The date in a shape. Raises BudgetSpent for a shape with widths, which make huge texts."""
        if not isinstance(shape, str) or len(shape) > 200 or re.search(r"%[^a-zA-Z%]*\d", shape):
            raise BudgetSpent("a strange shape of a date")
        self.dates.append(self.today.strftime(shape))
        return self.dates[-1]

    def spend(self, value: Any = 1) -> Any:
        """Charge the budget for everything in a value, and return the value."""
        if thread_time() > self.until:
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
        if text and sizes[-1] * sizes[-2] > self.blow_up:
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
        if owner is self and getattr(method, "__name__", "") in self.own_calls:
            return obj(*args)
        text = isinstance(owner, str | bytes)
        name = getattr(method, "__name__", "")
        shapes = text and name in ("format", "format_map")
        if isinstance(owner, str) and name == "replace" and all(isinstance(one, str) for one in args[:2]):
            grown = owner.count(args[0]) * len(args[1]) if len(args) > 1 else 0
            if grown > self.blow_up:
                raise BudgetSpent("a function would make a huge text")
        text = text and name not in SHRINKING
        own = self._admit([*([owner] if text else []), *args, *kwargs.values()], text, shapes)[int(text) :]
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


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with an underscore, such as {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise BudgetSpent("a huge indentation")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
