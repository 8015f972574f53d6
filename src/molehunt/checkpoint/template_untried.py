"""What no tried condition led to: texts that were never written, and conditions that never had one of their values."""

from collections.abc import Iterator, Mapping
from time import process_time

from jinja2 import nodes

from molehunt.checkpoint.chat_template import RENDER_LIMIT
from molehunt.checkpoint.template_branches import Branch, WatchedProgram
from molehunt.checkpoint.template_cells import RICH_TOOL, TriedConversation, everything
from molehunt.checkpoint.template_conditions import PASSING_FILTERS, PLAIN_TESTS, Kind, Reader
from molehunt.checkpoint.template_literals import literal_texts
from molehunt.checkpoint.template_sandbox import parse
from molehunt.checkpoint.template_words import WORD, composed, shown, squeezed, words

UNWRITTEN, UNTRIED = "text that no tried condition writes", "a condition that could not be tried"
FORCED_SECONDS = 0.8
"""Processor seconds after which no further condition of a template is forced."""
SHAPES = (
    nodes.Const, nodes.Name, nodes.NSRef, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Compare, nodes.Operand, nodes.And,
    nodes.Or, nodes.Not, nodes.Neg, nodes.Test, nodes.Filter, nodes.Call, nodes.List, nodes.Tuple, nodes.Add, nodes.Sub,
)  # fmt: skip
"""Parts of conditions that may be ones on keys, types and markers."""
MARKED = frozenset({"startswith", "endswith", "get", "keys", "items", "split", "strip", "lstrip", "rstrip"})
"""Methods with which templates look for markers."""
GIVEN = words(repr(RICH_TOOL))
"""Words of the tools that templates are given, which they write where they write a tool."""


class Unwritten:
    """The texts of a template that were not yet written, and all words that were."""

    def __init__(self, tree: nodes.Template) -> None:
        self.left: dict[str, int] = literal_texts(tree)
        """Texts that no rendering held so far, with the line of the source."""
        self.words: set[str] = set()
        self.prose: set[str] = set()

    def take(self, text: str) -> None:
        """Note what a rendered conversation holds."""
        if self.left:
            text = squeezed(text)
            for one in [one for one in self.left if one in text]:
                del self.left[one]

    def texts(self) -> Iterator[tuple[str, str, frozenset[str]]]:
        """Each condition, text and its words, for the texts that are left."""
        for text, line in self.left.items():
            yield f"{UNWRITTEN} (line {line})", text, words(text)


def forced_texts(
    program: WatchedProgram, tokens: Mapping[str, str], known: set[str]
) -> Iterator[tuple[Branch, bool, str, frozenset[str]]]:
    """Words that are written only if a condition is given a value that it never had: those that are put together anew.

    Args:
        program: after everything else was tried on it.
        tokens: the special tokens.
        known: all words that any rendering had.
    """
    until = process_time() + FORCED_SECONDS
    found: set[str] = set()
    for branch in program.branches:
        for value in program.missing(branch):
            if process_time() > until:
                return
            for cell in _cells(program, branch):
                program.watched.forced = {**dict(branch.path), branch.number: value}
                try:
                    text = program.text(cell.messages, tokens, today=cell.today, limit=RENDER_LIMIT, **cell.given)
                except Exception:  # forced conditions may contradict each other
                    continue
                finally:
                    program.watched.forced = {}
                if len(text) >= RENDER_LIMIT:
                    text = text[: text.rfind(" ")]  # the last word is cut
                new = words(text, [*tokens.values(), *program.dates]) - known - found - GIVEN
                new = frozenset(one for one in new if not composed(one))
                if new:
                    found |= new
                    yield branch, value, shown(text, new), new


def _cells(program: WatchedProgram, branch: Branch) -> list[TriedConversation]:
    """The conversation in which a branch, or the nearest one around it, was reached first, and one that has everything."""
    numbers = (branch.number, *(number for number, _ in reversed(branch.path)))
    reached = next((program.watched.first[n] for n in numbers if program.watched.first.get(n) is not None), None)
    return [one for one in (reached, everything()) if one is not None]


class MessageReader(Reader):
    """The reader of conditions without those on tools and documents, and without those on roles, keys, types and markers."""

    world = frozenset({"date_string"})

    def note(self, node: nodes.Node) -> Kind:
        return Kind.DERIVED if _of_shape(node) else super().note(node)


def _of_shape(node: nodes.Node) -> bool:
    """Whether a condition asks for nothing but keys, types, roles, markers, and whether there is any text."""
    if not isinstance(node, SHAPES):
        return False
    if isinstance(node, nodes.Const):
        return _plain(node.value)
    if isinstance(node, nodes.Filter) and node.name not in PASSING_FILTERS | {
        "length",
        "count",
        "selectattr",
        "map",
        "dictsort",
    }:
        return False
    if isinstance(node, nodes.Test) and node.name not in PLAIN_TESTS | {"equalto", "eq", "true", "false"}:
        return False
    if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Getattr) and node.node.attr in MARKED):
        return False
    return all(_of_shape(child) for child in node.iter_child_nodes())


def _plain(value: object) -> bool:
    if isinstance(value, str):
        pieces = WORD.findall(value)
        return not value.strip("{}[]") or (bool(pieces) and not words(value) and all(len(one) > 1 for one in pieces))
    return value is None or isinstance(value, bool) or value in (0, 1, 2)


def message_conditions(template: str) -> set[str]:
    """Conditions on what messages say or on the day. Raises TemplateError for a template that cannot be parsed."""
    return MessageReader(parse(template)).found


def untried_conditions(template: str, program: WatchedProgram) -> list[str]:
    """Conditions on messages or the day that never had one of their two values, so that nobody knows what they do."""
    looked = message_conditions(template)
    found = (one for one in program.branches if one.whole and one.parts & looked and program.missing(one))
    return list(dict.fromkeys(one.source for one in found))
