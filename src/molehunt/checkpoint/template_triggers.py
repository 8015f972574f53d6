"""Conditions of a template that look for something in particular: words, numbers of turns, special tokens, days."""

import re
from collections import defaultdict
from collections.abc import Iterator

from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from molehunt.checkpoint.chat_template import SPECIAL
from molehunt.checkpoint.template_conditions import ANY, NONE, PLAIN_TESTS, Kind, Reader, source
from molehunt.checkpoint.template_sandbox import parse
from molehunt.checkpoint.template_words import words

FEW_TURNS = 3
"""A condition on a number of turns from here on is none of the first, the last, or whose turn it is."""
LONG = 20
"""A condition on a number of characters from here on is none of whether there is text."""
COUNTERS = frozenset({"index", "index0", "revindex", "revindex0", "length"})
IDS = frozenset({"id", "tool_call_id", "call_id"})
CHANCE = frozenset({"random"})


def trigger_conditions(template: str) -> dict[str, str]:
    """Conditions that no ordinary template has, with the reason. Empty for a template that cannot be parsed."""
    try:
        tree = parse(template)
        looked = Reader(tree)
    except Exception:  # the renderer reports it
        return {}
    texts = _texts_of_names(tree)
    found: dict[str, str] = {}
    for node in looked.nodes:
        if _wanted(node, {name: some for name, some in texts.items() if not looked.names.get(name, NONE) & ANY}):
            found[_line(node)] = "a condition looks for particular words in a message, or for a particular day"
        elif _long(node):
            found[_line(node)] = "a condition looks at how long a message is"
        elif any(f.name in CHANCE for f in (node, *node.find_all(nodes.Filter)) if isinstance(f, nodes.Filter)):
            found[_line(node)] = "the text depends on chance"
    for node in tree.find_all((nodes.Compare, nodes.Test, nodes.Filter, nodes.Call)):
        if isinstance(node, nodes.Compare) and _counts(node):
            found[_line(node)] = "a condition looks at how many turns there are"
        if _asks_token(node):
            found[_line(node)] = "a condition looks at a special token"
    for node in tree.find_all((nodes.Mod, nodes.FloorDiv, nodes.Div, nodes.Pow)):
        formatted = isinstance(node.left, nodes.Const) and isinstance(node.left.value, str)
        if not formatted and any(looked.of(side) & (Kind.CONTENT | Kind.DERIVED) for side in (node.left, node.right)):
            found[_line(node)] = "a condition computes with what messages say"
    return found


def _line(node: nodes.Node) -> str:
    return " ".join(source(node).split())


def _texts_of_names(tree: nodes.Template) -> dict[str, set[str]]:
    """Texts that a template itself gives to its names, wherever it does so; names that take other names' values, too."""
    given: list[tuple[list[str], nodes.Node]] = []
    for node in tree.find_all((nodes.Assign, nodes.For, nodes.With, nodes.Macro)):
        if isinstance(node, nodes.Assign):
            given.append((_names(node.target), node.node))
        elif isinstance(node, nodes.For):
            given.append((_names(node.target), node.iter))
        elif isinstance(node, nodes.With):
            given += [(_names(t), v) for t, v in zip(node.targets, node.values, strict=True)]
        else:
            pairs = zip(node.args[::-1], node.defaults[::-1], strict=False)
            given += [(_names(arg), default) for arg, default in pairs]
    found: dict[str, set[str]] = defaultdict(set)
    for _ in range(4):
        for names, value in given:
            texts = {t for t in _own_texts(value)}
            for one in _names(value):
                texts |= found.get(one, set())
            for name in names:
                found[name] |= texts
    return found


def _names(node: nodes.Node) -> list[str]:
    inner = [node, *node.find_all((nodes.Name, nodes.NSRef))]
    return [one.name for one in inner if isinstance(one, nodes.Name | nodes.NSRef)]


def _own_texts(node: nodes.Node) -> Iterator[str]:
    """Texts in an expression, without the shapes of dates and the names of keys and tests."""
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "strftime_now":
        return
    if isinstance(node, nodes.Getitem):
        yield from _own_texts(node.node)
        return
    if isinstance(node, nodes.Test) and node.name in PLAIN_TESTS:
        return
    value = node.value if isinstance(node, nodes.Const) else None
    if type(value) in (str, int) and value not in FILTERS and value not in TESTS:
        yield str(value)
    for one in node.iter_child_nodes():
        yield from _own_texts(one)


def _wanted(node: nodes.Node, texts: dict[str, set[str]]) -> bool:
    """Whether an expression looks for words that are no markers, or for a number with as many digits as a year."""
    own = set(_own_texts(node))
    asked = [
        one for one in (node, *node.find_all(nodes.Test)) if isinstance(one, nodes.Test) and one.name in PLAIN_TESTS
    ]
    passive = {name for one in asked for name in _names(one)}
    for name in set(_names(node)) - passive:
        some = texts.get(name, set())
        own |= some if len(some) <= 3 and all(len(text) <= 60 for text in some) else set()
    return any(words(text) or re.search(r"(?<!\d)\d{4,8}(?!\d)", text) for text in own)


def _long(node: nodes.Node) -> bool:
    if not isinstance(node, nodes.Compare):
        return False
    if any(one.attr in IDS for one in node.find_all(nodes.Getattr)):
        return False
    counted = any(one.name in ("length", "count") for one in node.find_all(nodes.Filter))
    return counted and any(type(one.value) is int and one.value >= LONG for one in node.find_all(nodes.Const))


def _counts(node: nodes.Compare) -> bool:
    """Whether a comparison is of a number of turns, or of the place in a loop, with a number that is not small."""
    if any(True for _ in node.find_all(nodes.Mod)):
        return False
    counts = any(one.name in ("length", "count") and "messages" in _names(one) for one in node.find_all(nodes.Filter))
    counts |= any(
        one.attr in COUNTERS and isinstance(one.node, nodes.Name) and one.node.name == "loop"
        for one in node.find_all(nodes.Getattr)
    )
    return counts and any(type(one.value) is int and one.value >= FEW_TURNS for one in node.find_all(nodes.Const))


def _asks_token(node: nodes.Node) -> bool:
    """Whether an expression compares a special token, or computes with its letters."""
    tokens = {*SPECIAL}
    if isinstance(node, nodes.Compare):
        return any(_is(one, tokens) for one in (node.expr, *(o.expr for o in node.ops)))
    if isinstance(node, nodes.Test):
        return node.name not in ("defined", "undefined", "none", "string") and _is(node.node, tokens)
    if isinstance(node, nodes.Filter):
        return (
            node.name in ("length", "count", "list", "first", "last")
            and node.node is not None
            and _is(node.node, tokens)
        )
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return node.node.attr not in ("strip", "rstrip", "lstrip") and _is(node.node.node, tokens)
    return False


def _is(node: nodes.Node, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names
