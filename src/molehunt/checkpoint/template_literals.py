"""Texts that a template's source holds to be written, also those put together from pieces, and which never were."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from jinja2 import TemplateError, nodes

from molehunt.checkpoint.template_sandbox import Bounded
from molehunt.checkpoint.template_words import prose, squeezed, words

MOST = 400
"""Greatest number of texts of one template that are followed."""
LONGEST = 400
"""Greatest number of characters of one text that are compared."""
ASKING = frozenset({"raise_exception", "strftime_now"})
"""Functions whose arguments are not written."""
LOOKING = frozenset(
    {
        "get", "pop", "startswith", "endswith", "find", "rfind", "index", "rindex", "count", "split", "rsplit", "partition",
        "rpartition", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix",
    }
)  # fmt: skip
"""Methods whose arguments are looked for, and not written."""
LOOKING_FILTERS = frozenset(
    {"selectattr", "rejectattr", "select", "reject", "map", "attr", "groupby", "sort", "unique", "trim"}
)
SHORT = 3
"""Greatest number of characters of the texts in a list that are looked at as one text: letters that are joined later."""


def literal_texts(tree: nodes.Template) -> dict[str, int]:
    """Lines of text with words of their own that stand in a template to be written, with the line of the source.

    An expression that only constants take part in counts with its value, such as a joined list of letters.
    """
    found: dict[str, int] = {}
    sandbox = Bounded()
    for text, line in _texts(tree, sandbox):
        for piece in re.split(r"\n|%[-+ 0-9.]*[a-zA-Z]|\{[^{}\s]*\}", text):
            piece = squeezed(piece)[:LONGEST]
            if (words(piece) or prose(piece)) and len(found) < MOST:
                found.setdefault(piece, line)
    return found


def _texts(node: nodes.Node, sandbox: Bounded) -> Iterator[tuple[str, int]]:
    if isinstance(node, nodes.TemplateData):
        yield node.data, node.lineno
        return
    if isinstance(node, nodes.Compare | nodes.Test):
        return  # what is looked for
    if isinstance(node, nodes.Expr) and not isinstance(node, nodes.Const):
        value = _constant(node, sandbox)
        if value is not None:
            yield value, node.lineno
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value, node.lineno
    for child in _written(node):
        if not (isinstance(node, nodes.If) and child in node.body and _never(node.test, sandbox)):
            yield from _texts(child, sandbox)


def _never(test: nodes.Node, sandbox: Bounded) -> bool:
    """Whether a condition is false whatever the conversation, since no name takes part in it."""
    if any(True for _ in test.find_all(nodes.Name)) or isinstance(test, nodes.Name):
        return False
    try:
        sandbox.start(0, sandbox.today)
        return not _evaluated(cast(nodes.Expr, test), sandbox)
    except Exception:  # an untrusted expression can raise any exception
        return False


def _written(node: nodes.Node) -> Iterator[nodes.Node]:
    """Children of a node whose texts may be written."""
    if isinstance(node, nodes.Getitem):
        yield node.node
    elif isinstance(node, nodes.Call):
        name = node.node.name if isinstance(node.node, nodes.Name) else ""
        method = node.node.attr if isinstance(node.node, nodes.Getattr) else ""
        if method:
            yield node.node
        if name in ASKING:
            return
        yield from node.args[1:] if method in LOOKING or method == "replace" else node.args
        yield from (pair.value for pair in node.kwargs)
    elif isinstance(node, nodes.Filter):
        if node.node is not None:
            yield node.node
        if node.name not in LOOKING_FILTERS:
            yield from node.args[1:] if node.name == "replace" else node.args
    else:
        yield from node.iter_child_nodes()


def _constant(node: nodes.Expr, sandbox: Bounded) -> str | None:
    """The text that an expression of constants has as its value; None where others take part, or it fails."""
    if not isinstance(
        node,
        nodes.Add | nodes.Concat | nodes.Mod | nodes.Filter | nodes.Call | nodes.Getitem | nodes.List | nodes.Tuple,
    ):
        return None
    if any(
        isinstance(one, nodes.Name | nodes.NSRef | nodes.TemplateData) for one in (node, *node.find_all(nodes.Node))
    ):
        return None
    try:
        sandbox.start(0, sandbox.today)
        value: Any = _evaluated(node, sandbox)
    except Exception:  # an untrusted expression can raise any exception
        return None
    if isinstance(value, list | tuple):
        texts = [one for one in cast("list[Any]", value) if isinstance(one, str)]
        value = "".join(texts) if all(len(one) <= SHORT for one in texts) else None
    return value if isinstance(value, str) else None


def _evaluated(node: nodes.Expr, sandbox: Bounded) -> Any:
    """The value of an expression, by the sandbox itself. Raises whatever the expression raises."""
    holder: dict[str, Any] = {}
    name = nodes.Name("zqvalue", "store")
    tree = nodes.Template([nodes.Assign(name, node)], lineno=1)
    module: Mapping[str, Any] = _run(tree.set_environment(sandbox), sandbox)
    holder.update(module)
    if "zqvalue" not in holder:
        raise TemplateError("no value")
    return holder["zqvalue"]


def _run(tree: nodes.Node, sandbox: Bounded) -> Mapping[str, Any]:
    template = sandbox.from_string(cast(nodes.Template, tree))
    return cast("Mapping[str, Any]", vars(template.make_module()))
