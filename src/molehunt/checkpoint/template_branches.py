"""The conditions and loops of a template while it is rendered: which values they had, and what it writes if one is forced."""

from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from jinja2 import nodes
from jinja2.runtime import Undefined
from jinja2.visitor import NodeTransformer

from molehunt.checkpoint.chat_template import Program
from molehunt.checkpoint.template_conditions import source
from molehunt.checkpoint.template_sandbox import Bounded

TRUE, FALSE = 1, 2
FILLER = "zqforced"
"""What a forced loop runs over."""
DEEPEST = 6
"""Number of calls of macros within each other that are followed to where they are called."""
Path = tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """One condition or loop of a template."""

    number: int
    source: str
    parts: frozenset[str]
    """Sources of the expressions that it consists of."""
    path: Path
    """The conditions and loops around it, outermost first, with the value that leads here."""
    macro: str
    """The macro that it stands in, if any."""
    whole: bool
    """Whether it decides what is written by itself, and is no part of a larger condition."""
    fixed: bool
    """Whether no name takes part in it, so that it always has one value."""


class Branches(NodeTransformer):
    """Reports every condition and loop of a syntax tree to the sandbox that runs it."""

    def __init__(self) -> None:
        self.found: list[Branch] = []
        self.calls: dict[str, tuple[Path, str]] = {}
        """Where each macro is called first."""
        self._path: Path = ()
        self._macro = ""
        self._inside = False
        """Whether the expression belongs to a condition."""

    def add(self, node: nodes.Node, *, whole: bool) -> int:
        """A new branch for a condition, which is not yet rewritten."""
        parts = frozenset(_line(one) for one in (node, *node.find_all(nodes.Expr)))
        fixed = not any(isinstance(one, nodes.Name) for one in (node, *node.find_all(nodes.Name)))
        self.found.append(Branch(len(self.found), _line(node), parts, self._path, self._macro, whole, fixed))
        return self.found[-1].number

    @contextmanager
    def _under(self, number: int, value: bool) -> Generator[None]:
        before, self._path = self._path, (*self._path, (number, value))
        yield
        self._path = before

    def _all(self, body: Iterable[nodes.Node]) -> list[Any]:
        return [self.visit(one) for one in body]

    def _condition(self, node: nodes.Node) -> tuple[int, nodes.Expr]:
        number = self.add(node, whole=True)
        before, self._inside = self._inside, True
        seen = self.visit(node)
        self._inside = before
        return number, _reported("branch", number, seen)

    def visit_If(self, node: nodes.If) -> nodes.Node:
        number, node.test = self._condition(node.test)
        with self._under(number, True):
            node.body = self._all(node.body)
        with self._under(number, False):
            node.elif_, node.else_ = self._all(node.elif_), self._all(node.else_)
        return node

    def visit_CondExpr(self, node: nodes.CondExpr) -> nodes.Node:
        number, node.test = self._condition(node.test)
        with self._under(number, True):
            node.expr1 = self.visit(node.expr1)
        with self._under(number, False):
            node.expr2 = self.visit(node.expr2) if node.expr2 is not None else None
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        number = self.add(node.iter, whole=True)
        node.iter = _reported("looped", number, self.visit(node.iter))
        with self._under(number, True):
            if node.test is not None:
                inner, node.test = self._condition(node.test)
                with self._under(inner, True):
                    node.body = self._all(node.body)
            else:
                node.body = self._all(node.body)
        with self._under(number, False):
            node.else_ = self._all(node.else_)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        number = self.add(node, whole=not self._inside)
        return _reported("branch", number, cast(nodes.Expr, self.generic_visit(node)))

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        number = self.add(node, whole=not self._inside)
        return _reported("branch", number, cast(nodes.Expr, self.generic_visit(node)))

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        path, macro, self._path, self._macro = self._path, self._macro, (), node.name
        self.generic_visit(node)
        self._path, self._macro = path, macro
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if isinstance(node.node, nodes.Name) and node.node.name != self._macro:
            self.calls.setdefault(node.node.name, (self._path, self._macro))
        return self.generic_visit(node)


class WatchedSandbox(Bounded):
    """The sandbox of templates, which takes down the values of conditions and can force them."""

    own_calls = frozenset({"spend", "branch", "looped"})

    def __init__(self) -> None:
        self.values: dict[int, int] = defaultdict(int)
        self.first: dict[int, Any] = {}
        """What was rendered when a branch was reached first."""
        self.rendered: Any = None
        self.forced: dict[int, bool] = {}
        super().__init__()

    def branch(self, number: int, value: Any) -> Any:
        """The value of a condition, or the one that is forced upon it."""
        if self.forced:
            return self.forced.get(number, value)
        self.first.setdefault(number, self.rendered)
        try:
            self.values[number] |= TRUE if value else FALSE
        except Exception:  # an undefined value that must not be asked
            self.values[number] |= FALSE
        return value

    def looped(self, number: int, items: Any) -> Any:
        """What a loop runs over, or something else if its condition is forced."""
        if items is None or isinstance(items, Undefined):
            some = cast("list[Any]", [])
        else:
            items = some = items if hasattr(items, "__len__") else list(self.spend(items))
        if number in self.forced:
            return (some or [FILLER]) if self.forced[number] else []
        if not self.forced:
            self.first.setdefault(number, self.rendered)
            self.values[number] |= TRUE if len(some) else FALSE
        return items


class WatchedProgram(Program):
    """A template whose conditions are taken down. Raises TemplateError if it cannot be compiled."""

    def __init__(self, template: str) -> None:
        self._branches = Branches()
        self.watched = WatchedSandbox()
        super().__init__(template)
        self.branches = [self._outside(one) for one in self._branches.found]

    def _prepared(self, tree: nodes.Template) -> nodes.Template:
        return cast(nodes.Template, self._branches.visit(tree))

    def _sandbox(self) -> Bounded:
        return self.watched

    def _outside(self, branch: Branch) -> Branch:
        """The branch with the path to the call of its macro before its own."""
        path, macro = branch.path, branch.macro
        for _ in range(DEEPEST):
            if macro not in self._branches.calls:
                break
            before, macro = self._branches.calls[macro]
            path = (*before, *path)
        return replace(branch, path=path)

    def missing(self, branch: Branch) -> list[bool]:
        """The values that a branch never had and could have."""
        if any(self.branches[number].fixed for number in (branch.number, *(number for number, _ in branch.path))):
            return []
        had = self.watched.values.get(branch.number, 0)
        return [value for value, bit in ((True, TRUE), (False, FALSE)) if not had & bit]


def _line(node: nodes.Node) -> str:
    return " ".join(source(node).split())


def _reported(method: str, number: int, value: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), [nodes.Const(number), value], [], None, None)
