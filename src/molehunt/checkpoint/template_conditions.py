"""Conditions of a chat template on the content of a message, the date, tools, documents or chance.

The analysis follows the syntax tree, not the text. Order and scope are ignored: a name carries all values that are
assigned to it anywhere, by a loop, a macro or a block.
"""

from collections import defaultdict
from collections.abc import Iterable
from enum import Flag, auto
from functools import reduce
from operator import or_

from jinja2 import nodes

from molehunt.checkpoint.template_sandbox import parse

PASSES = 20
"""Greatest number of passes over a template until the values of names no longer change."""
WORLD = frozenset(
    {
        "strftime_now", "date_string", "tools", "documents", "custom_tools", "builtin_tools", "available_tools", "xml_tools",
        "python_tools",
    }
)  # fmt: skip
PLAIN_TESTS = frozenset({"defined", "undefined", "none", "string", "iterable", "mapping", "sequence", "boolean"})
"""Tests that only check whether a value exists and which type it has."""
PASSING_FILTERS = frozenset(
    {
        "trim", "string", "safe", "escape", "e", "forceescape", "default", "d", "tojson", "upper", "lower", "capitalize",
        "title", "indent", "items", "list", "reverse", "join", "first", "last",
    }
)  # fmt: skip
"""Filters that pass text on and do not depend on its content."""
PASSING_METHODS = frozenset(
    {"items", "values", "copy", "strip", "lstrip", "rstrip", "upper", "lower", "title", "capitalize", "join", "format"}
)
ORDINARY_KEYS = frozenset({"role", "type"})


class Kind(Flag):
    """Kinds of data that a value may carry."""

    NONE = 0
    LIST = auto()
    """A list of messages."""
    MESSAGE = auto()
    CONTENT = auto()
    """A part of a message, unchanged."""
    DERIVED = auto()
    """A value computed from the content of a message."""
    WORLD = auto()
    """The date, tools, documents or chance."""


NONE, LIST, MESSAGE, CONTENT, DERIVED = Kind.NONE, Kind.LIST, Kind.MESSAGE, Kind.CONTENT, Kind.DERIVED
INFORMATION = CONTENT | DERIVED | Kind.WORLD
ANY = INFORMATION | LIST | MESSAGE


def content_conditions(template: str) -> set[str]:
    """Expressions of a template that depend on a message's content, beyond whether it exists or is a string.

    Conditions on the date, tools, documents or chance are included. A template that cannot be parsed gives one entry.
    """
    try:
        return Reader(parse(template)).found
    except Exception as error:  # deep nesting and broken syntax raise many things
        return {f"(cannot be parsed: {type(error).__name__}: {str(error)[:200]})"}


class Reader:
    """Propagates the kinds of data that names carry to a fixed point, then records the conditions on them."""

    world = WORLD

    def __init__(self, tree: nodes.Template) -> None:
        self.found: set[str] = set()
        self.nodes: list[nodes.Node] = []
        """The expressions that `found` has as text."""
        self.names: dict[str, Kind] = defaultdict(lambda: NONE)
        self.spaces: set[str] = set()
        self.quiet = True
        self.macros: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for macro in tree.find_all(nodes.Macro):
            self.macros[macro.name].add(tuple(arg.name for arg in macro.args))
        for block in tree.find_all(nodes.CallBlock):
            self.macros["caller"].add(tuple(arg.name for arg in block.args))
        for _ in range(PASSES):
            before = dict(self.names)
            self.walk(tree.body)
            if before == self.names:
                break
        else:
            self.found.add("(too tangled to follow)")
        self.quiet = False
        self.walk(tree.body)

    def note(self, node: nodes.Node) -> Kind:
        if not self.quiet:
            self.found.add(" ".join(source(node).split()))
            self.nodes.append(node)
        return DERIVED

    def bind(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Name):
            self.names[target.name] |= kind
        elif isinstance(target, nodes.NSRef):
            self.spaces.add(target.name)
            self.names[f"{target.name}.{target.attr}"] |= kind
        else:
            for one in target.iter_child_nodes():
                self.bind(one, kind)

    def check(self, test: nodes.Node) -> None:
        quiet, self.quiet = self.quiet, True
        kind = self.truth(test)
        self.quiet = quiet
        if kind & INFORMATION:
            self.note(test)

    def truth(self, node: nodes.Node) -> Kind:
        """The same as `of`, except that a part of a message by itself is only tested for its existence."""
        if isinstance(node, nodes.Not):
            return self.truth(node.node)
        if isinstance(node, nodes.And | nodes.Or):
            return self.truth(node.left) | self.truth(node.right)
        kind = self.of(node)
        return kind & ~CONTENT if isinstance(node, nodes.Name | nodes.Getattr | nodes.Getitem) else kind

    def walk(self, body: Iterable[nodes.Node]) -> Kind:
        """Kinds of data that a list of statements writes."""
        out = NONE
        for node in body:
            out |= self.of(node) if isinstance(node, nodes.Expr) else self.statement(node)
        return out

    def statement(self, node: nodes.Node) -> Kind:
        match node:
            case nodes.For():
                self.bind(node.target, element(self.of(node.iter)))
                if node.test is not None:
                    self.check(node.test)
                return self.walk([*node.body, *node.else_])
            case nodes.If():
                self.check(node.test)
                return self.walk([*node.body, *node.elif_, *node.else_])
            case nodes.Macro() | nodes.CallBlock():
                for arg, default in zip(node.args[::-1], node.defaults[::-1], strict=False):
                    self.bind(arg, self.of(default))
                name = node.name if isinstance(node, nodes.Macro) else "caller"
                self.names[f"{name}()"] |= self.walk(node.body)
                return self.of(node.call) if isinstance(node, nodes.CallBlock) else NONE
            case nodes.FilterBlock():
                return self.filtered(node.filter, self.walk(node.body))
            case nodes.AssignBlock():
                kind = self.walk(node.body)
                self.bind(node.target, self.filtered(node.filter, kind) if node.filter else kind)
            case nodes.Assign():
                self.assign(node.target, node.node)
            case nodes.With():
                for target, value in zip(node.targets, node.values, strict=True):
                    self.assign(target, value)
                return self.walk(node.body)
            case nodes.ExprStmt():
                self.of(node.node)
            case _:
                return self.walk(node.iter_child_nodes())
        return NONE

    def assign(self, target: nodes.Node, value: nodes.Node) -> None:
        if isinstance(target, nodes.Tuple) and isinstance(value, nodes.Tuple) and len(target.items) == len(value.items):
            for one, other in zip(target.items, value.items, strict=True):
                self.assign(one, other)
            return
        made = isinstance(value, nodes.Call) and isinstance(value.node, nodes.Name) and value.node.name == "namespace"
        if made and isinstance(value, nodes.Call) and isinstance(target, nodes.Name) and not value.args:
            self.spaces.add(target.name)
            for pair in value.kwargs:
                self.names[f"{target.name}.{pair.key}"] |= self.of(pair.value)
            if not value.dyn_kwargs and not value.dyn_args:
                return
        self.bind(target, self.of(value))

    def union(self, parts: Iterable[nodes.Node | None]) -> Kind:
        return reduce(or_, (self.of(one) for one in parts if one is not None), NONE)

    def of(self, node: nodes.Node) -> Kind:
        """Kinds of data that an expression may carry."""
        match node:
            case nodes.Name():
                return self.name(node.name)
            case nodes.Getattr() | nodes.Getitem():
                return self.path(node)
            case nodes.Compare():
                return self.compared(node)
            case nodes.Test():
                kind, given = self.of(node.node), self.arguments(node)
                if node.name in PLAIN_TESTS:
                    return kind & (DERIVED | Kind.WORLD)
                return self.note(node) if (kind | given) & ANY else NONE
            case nodes.Filter():
                return self.filtered(node, self.of(node.node) if node.node is not None else NONE)
            case nodes.Call():
                return self.called(node)
            case nodes.CondExpr():
                self.check(node.test)
                quiet, self.quiet = self.quiet, True
                seen = self.truth(node.test) & INFORMATION
                self.quiet = quiet
                return self.union([node.expr1, node.expr2]) | (DERIVED if seen else NONE)
            case nodes.And():
                kind = self.of(node.left)
                return kind | self.of(node.right) | (self.note(node) if kind & INFORMATION else NONE)
            case nodes.Mul():
                kind = self.union([node.left, node.right])
                return self.note(node) if kind & ANY else NONE
            case nodes.List() | nodes.Tuple():
                kind = self.union(node.items)
                return kind & ~MESSAGE | (LIST if kind & MESSAGE else NONE)
            case nodes.Dict():
                ordinary = [p.value for p in node.items if isinstance(p.key, nodes.Const) and p.key.value == "role"]
                kind = self.union([*(p.value for p in node.items), *(p.key for p in node.items)])
                hidden = DERIVED if self.union(ordinary) & ANY else NONE
                return kind & INFORMATION & ~CONTENT | (MESSAGE if kind & ANY else NONE) | hidden
            case nodes.Concat():
                return content(self.union(node.nodes))
            case _:
                return self.union(node.iter_child_nodes())

    def name(self, name: str) -> Kind:
        kind = self.names.get(name, NONE)
        if name in self.spaces:
            for key, one in self.names.items():
                kind |= one if key.startswith(f"{name}.") else NONE
        if name == "messages":
            return kind | LIST
        if name in self.world:
            return kind | Kind.WORLD
        return CONTENT if name == "content" and name not in self.names else kind

    def path(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        key: object = node.attr if isinstance(node, nodes.Getattr) else constant(node.arg)
        if isinstance(node.node, nodes.Name) and isinstance(key, str):
            if node.node.name in self.spaces:
                return self.names.get(f"{node.node.name}.{key}", NONE) | self.names.get(node.node.name, NONE)
            if node.node.name == "loop" and key in ("previtem", "nextitem"):
                return MESSAGE
        kind = self.of(node.node)
        if isinstance(node, nodes.Getattr):
            return selected(kind, key)
        if isinstance(node.arg, nodes.Slice):
            self.of(node.arg)
            return kind | (DERIVED if kind & CONTENT else NONE)
        keyed = self.of(node.arg) & ANY  # a look-up by the content of a message is a condition
        far = isinstance(key, int) and key not in (0, -1) and kind & CONTENT  # is there so much text?
        return selected(kind, key) | (self.note(node) if keyed else NONE) | (DERIVED if far else NONE)

    def compared(self, node: nodes.Compare) -> Kind:
        sides = [self.of(node.expr), *(self.of(one.expr) for one in node.ops)]
        if all(side and not side & ~(LIST | MESSAGE) for side in sides):
            return NONE  # messages with messages: is this the first one?
        if len(sides) == 2 and node.ops[0].op in ("in", "notin") and sides[1] == MESSAGE and not sides[0]:
            return NONE  # has it this key?
        return self.note(node) if any(side & ANY for side in sides) else NONE

    def arguments(self, node: nodes.Call | nodes.Filter | nodes.Test) -> Kind:
        return self.union([*node.args, *(pair.value for pair in node.kwargs), node.dyn_args, node.dyn_kwargs])

    def filtered(self, node: nodes.Filter, kind: Kind) -> Kind:
        given = self.arguments(node)
        first = constant(node.args[0]) if node.args else None
        attribute = next((constant(pair.value) for pair in node.kwargs if pair.key == "attribute"), None)
        bare = not kind & INFORMATION and not given & ANY
        if node.name == "random":
            return self.note(node) | Kind.WORLD
        if node.name in ("length", "count") and bare:
            return NONE
        if node.name in ("first", "last"):
            return element(kind) | kind & MESSAGE
        if node.name in ("list", "reverse", "default", "d"):
            return kind | (given if node.name in ("default", "d") else NONE)
        if node.name in ("selectattr", "rejectattr") and bare and first in ORDINARY_KEYS:
            return kind
        if node.name == "map" and bare and attribute is not None:
            return selected(element(kind), attribute)
        if node.name == "attr" and first is not None:
            return selected(kind, first)
        if node.name in PASSING_FILTERS:
            return content(kind | given)
        return self.note(node) if (kind | given) & ANY else NONE

    def called(self, node: nodes.Call) -> Kind:
        given = self.arguments(node)
        if isinstance(node.node, nodes.Name):
            name = node.node.name
            if name in self.macros:
                for names in self.macros[name]:
                    self.hand_over(node, names)
                return self.names.get(f"{name}()", NONE)
            if name == "strftime_now":
                return Kind.WORLD
            if name == "raise_exception":
                return NONE
            if name in ("dict", "namespace"):
                return given & ~CONTENT | (MESSAGE if given & ANY else NONE)
            return self.note(node) if (given | self.name(name)) & ANY else NONE
        if isinstance(node.node, nodes.Getattr):
            kind, key = self.of(node.node.node), node.node.attr
            first = constant(node.args[0]) if node.args else None
            if key == "get":
                keyed = bool(node.args) and bool(self.of(node.args[0]) & ANY)
                return selected(kind, first) | self.union(node.args[1:]) | (self.note(node) if keyed else NONE)
            if key == "keys" and not kind & INFORMATION:
                return NONE
            if key in PASSING_METHODS:
                return kind if key == "copy" else content(kind | given)
        else:
            kind = self.of(node.node)
        return self.note(node) if (kind | given) & ANY else NONE

    def hand_over(self, node: nodes.Call, names: tuple[str, ...]) -> None:
        rest = self.union([node.dyn_args, node.dyn_kwargs])
        for place, arg in enumerate(node.args):
            self.names[names[place] if place < len(names) else "varargs"] |= self.of(arg)
        for pair in node.kwargs:
            self.names[pair.key if pair.key in names else "kwargs"] |= self.of(pair.value)
        for name in (*names, "varargs", "kwargs") if rest else ():
            self.names[name] |= rest | content(element(rest))


def constant(node: nodes.Node) -> object:
    return node.value if isinstance(node, nodes.Const) else None


def content(kind: Kind) -> Kind:
    """The kind of a value that is turned into text: a message becomes its content."""
    return kind & INFORMATION | (CONTENT if kind & (LIST | MESSAGE) else NONE)


def element(kind: Kind) -> Kind:
    return kind & INFORMATION | (MESSAGE if kind & LIST else NONE)


def selected(kind: Kind, key: object) -> Kind:
    """Kinds of data under a key; the key is None if it is not a literal."""
    out = kind & (DERIVED | Kind.WORLD)
    if kind & LIST:
        out |= CONTENT if isinstance(key, str) and not key.isdigit() else MESSAGE
    if (kind & MESSAGE and key != "role") or (kind & CONTENT and key not in ORDINARY_KEYS):
        out |= CONTENT
    return out | (CONTENT if isinstance(key, str) and ("content" in key or key == "text") else NONE)


OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in",
}  # fmt: skip


def source(node: nodes.Node | None) -> str:
    """Source text of an expression, the same for any spacing and quoting."""
    match node:
        case None:
            return ""
        case nodes.Name():
            return node.name
        case nodes.Const():
            return repr(node.value)
        case nodes.TemplateData():
            return repr(node.data)
        case nodes.Getattr():
            return f"{source(node.node)}.{node.attr}"
        case nodes.Getitem():
            return f"{source(node.node)}[{source(node.arg)}]"
        case nodes.Slice():
            return ":".join(source(one) for one in (node.start, node.stop, node.step)).removesuffix(":")
        case nodes.Compare():
            return source(node.expr) + "".join(f" {OPERATORS[one.op]} {source(one.expr)}" for one in node.ops)
        case nodes.Filter() | nodes.Test() | nodes.Call():
            given = [source(one) for one in node.args] + [f"{p.key}={source(p.value)}" for p in node.kwargs]
            given += [f"*{source(one)}" for one in (node.dyn_args, node.dyn_kwargs) if one is not None]
            if isinstance(node, nodes.Call):
                return f"{source(node.node)}({', '.join(given)})"
            join = " is " if isinstance(node, nodes.Test) else "|"
            return f"{source(node.node)}{join}{node.name}" + (f"({', '.join(given)})" if given else "")
        case nodes.CondExpr():
            return f"({source(node.expr1)} if {source(node.test)} else {source(node.expr2)})"
        case nodes.And() | nodes.Or() | nodes.BinExpr():
            return f"({source(node.left)} {node.operator} {source(node.right)})"
        case nodes.Not():
            return f"not {source(node.node)}"
        case nodes.UnaryExpr():
            return f"{node.operator}{source(node.node)}"
        case nodes.Concat():
            return " ~ ".join(map(source, node.nodes))
        case nodes.List() | nodes.Tuple():
            return f"[{', '.join(map(source, node.items))}]"
        case nodes.Dict():
            return "{" + ", ".join(f"{source(pair.key)}: {source(pair.value)}" for pair in node.items) + "}"
        case _:
            return type(node).__name__
