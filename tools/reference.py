"""Write docs/reference.md from the source: public names, results, options, and commands, each with its docstring.

Signatures and docstrings are read from the syntax trees, so nothing depends on which libraries are installed. Commands
are read as typer declares them. `python tools/reference.py --check` fails where the page is not what this would write.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

import molehunt
from molehunt.cli.main import COMMANDS, _app

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"
WIDTH = 110
SECTION = re.compile(r"^(Args|Returns|Raises|Example|Examples|Source):\s*(.*)$")
HEAD = """\
# Reference

`python tools/reference.py` writes this page from the source, and a test checks that it is up to date.
[The tutorial](tutorial.md) shows the functions at work, and [the guides](index.md) the commands.

"""
RESULTS = {
    "AuditResult": "molehunt.workflows.audit",
    "WatchResult": "molehunt.workflows.watch",
    "AnswerVerdict": "molehunt.workflows.watch",
    "RowVerdict": "molehunt.watch.row_verdict",
    "SteerResult": "molehunt.workflows.steer",
    "TransferResult": "molehunt.workflows.transfer",
    "StressResult": "molehunt.workflows.stress",
    "FittedDetector": "molehunt.workflows.detector",
    "PlantResult": "molehunt.workflows.plant",
    "BenchResult": "molehunt.workflows.bench",
}
"""Classes of what the verbs return, and of what these return in turn."""
OPTIONS = {
    "WatchOptions": "molehunt.workflows.watch_options",
    "StressConfig": "molehunt.stress.evaluation.config",
    "SoftConfig": "molehunt.stress.attacks.soft_suffix",
    "DiscreteConfig": "molehunt.stress.attacks.discrete_suffix",
    "Track": "molehunt.run.progress",
}
"""Classes whose fields are arguments of verbs, and the type of `track`."""
AUTHORS = {
    "DetectorRecipe": "molehunt.detect.recipe",
    "FitInputs": "molehunt.detect.recipe",
    "FitRows": "molehunt.detect.recipe",
    "LabelledRows": "molehunt.detect.recipe",
    "Readout": "molehunt.detect.recipe",
    "AuditReadout": "molehunt.detect.recipe",
}
"""Classes that a detector of another package uses."""
SECTIONS = {
    "Results": (RESULTS, "The functions return these. A result comes from its function; nobody needs to make one."),
    "Options": (
        OPTIONS,
        "`molehunt.watch` takes the fields of `WatchOptions` as keyword arguments (`attacks` and `repeats` belong to "
        "`molehunt watch --attacks`), and `molehunt.stress` those of `StressConfig`. `Track` is what every argument "
        "`track` takes.",
    ),
    "For authors of detectors": (AUTHORS, "[Architecture](architecture.md#a-detector) has a worked example."),
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def page() -> str:
    """The whole document."""
    verbs = [name for name in molehunt.__all__ if isinstance(definition(name), ast.FunctionDef)]
    classes = [name for name in molehunt.__all__ if name not in verbs]
    parts = [HEAD, "## Functions\n\n"]
    parts += [function_entry(name, definition(name)) for name in verbs]
    parts.append("## Classes\n\n")
    parts += [class_entry(name, definition(name)) for name in classes]
    for title, (homes, introduction) in SECTIONS.items():
        parts.append(f"## {title}\n\n{paragraph(introduction)}\n\n")
        parts += [class_entry(name, definition(name, home), home) for name, home in homes.items()]
    parts.append("## Commands\n\n")
    parts += [entry for name in COMMANDS for entry in command_entries(name)]
    return "".join(parts).rstrip("\n") + "\n"


def definition(name: str, home: str | None = None) -> Any:
    """The node that defines a name in the module `home`, which for a public name is where `molehunt` imports it from."""
    home = home or molehunt._HOMES[name]
    path = ROOT / "src" / Path(*home.split(".")).with_suffix(".py")
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, Definition) and node.name == name]
    if not found:
        raise SystemExit(
            f"{path.relative_to(ROOT)} defines no {name}; molehunt/__init__.py or tools/ says that it does"
        )
    return found[-1]  # behind its overloads


def function_entry(name: str, node: ast.FunctionDef) -> str:
    """One public function: signature, then docstring."""
    return f"### `{name}`\n\n{signature_block(node, name)}{prose_of(node)}"


def class_entry(name: str, node: ast.ClassDef, home: str = "") -> str:
    """One class: docstring, the module to import it from, fields and methods."""
    text = f"### `{name}`\n\n{prose_of(node)}"
    extended = [base for base in map(ast.unparse, node.bases) if base in RESULTS or base in AUTHORS]
    notes = [f"Import it from `{home}`."] if home else []
    notes += [f"It also has everything that `{base}` has." for base in extended]
    text += f"{' '.join(notes)}\n\n" if notes else ""
    fields = list(fields_of(node))
    if fields:
        lines = [wrapped(f"- `{field}`: {words}" if words else f"- `{field}`", "  ") for field, words in fields]
        text += "\n".join(lines) + "\n\n"
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and shown(method):
            text += f"#### `{name}.{method.name}`\n\n{signature_block(method, method.name)}{prose_of(method)}"
    return text


def shown(method: ast.FunctionDef) -> bool:
    """Whether the reference lists a method: it is public, or it is how an object is made or called."""
    decorators = {ast.unparse(one) for one in method.decorator_list}
    documented = ast.get_docstring(method) is not None
    return "overload" not in decorators and (
        not method.name.startswith("_") or (method.name in ("__init__", "__call__") and documented)
    )


def fields_of(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Fields of a dataclass with the docstring that stands below each."""
    for one, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not one.target.id.startswith("_"):
            stands_below = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            words = str(after.value.value) if stands_below else ""  # pyright: ignore[reportAttributeAccessIssue]
            yield f"{one.target.id}: {ast.unparse(one.annotation)}{plain_default(one.value)}", " ".join(words.split())


def plain_default(value: ast.expr | None) -> str:
    """The default of a field as a reader writes it; empty where there is none, or where a call makes it."""
    return "" if value is None or isinstance(value, ast.Call) else f" = {ast.unparse(value)}"


def signature_block(node: ast.FunctionDef, name: str) -> str:
    """The signature as Python, an argument a line where one line is too short for it."""
    decorators = {ast.unparse(one) for one in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        returns = f": {annotation(node.returns)}" if node.returns else ""
        return f"```text\n{name}{returns}\n```\n\n"
    parts = [part for part in argument_list(node.args) if part not in ("self", "cls")]
    result = f" -> {annotation(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) > WIDTH:
        line = "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])
    return f"```text\n{line}\n```\n\n"


def annotation(node: ast.expr) -> str:
    """A type as a reader writes it: a class that names itself needs its quotes for Python alone."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def argument_list(arguments: ast.arguments) -> list[str]:
    """Every argument with its type and default, `*` where the rest is by name."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [argument(one, default) for one, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        parts.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [argument(one, default) for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*parts, f"**{ast.unparse(arguments.kwarg)}"] if arguments.kwarg else parts


def argument(one: ast.arg, default: ast.expr | None) -> str:
    value = "" if default is None else (" = " if one.annotation else "=") + ast.unparse(default)
    return f"{ast.unparse(one)}{value}"


def prose_of(node: Definition) -> str:
    """A docstring as Markdown: arguments as a list, examples as a block."""
    text = ast.get_docstring(node)
    return f"{markdown(text)}\n\n" if text else ""


def markdown(docstring: str) -> str:
    """Sections in Google's style become bold headings, lists and blocks; other text stays as it is, wrapped."""
    parts: list[str] = []
    title, body = "", list[str]()
    for line in [*docstring.splitlines(), "Source: end"]:
        found = SECTION.match(line)
        if found is None:
            body.append(line)
            continue
        parts.append(section(title, body))
        title, body = found[1], [found[2]] if found[2] else []
    return "\n\n".join(part for part in parts if part)


def section(title: str, body: list[str]) -> str:
    """One section of a docstring."""
    text = textwrap.dedent("\n".join(body)).strip("\n")
    if title in ("Example", "Examples"):
        code = [re.sub(r"  # doctest:.*$", "", line) for line in text.splitlines()]
        return "```text\n" + "\n".join(code) + "\n```"
    if title in ("Args", "Raises"):
        items = re.split(r"\n(?=\S)", text)
        lines = [wrapped(f"- `{name}`: {' '.join(rest.split())}", "  ") for name, _, rest in map(split_item, items)]
        return f"{'Arguments' if title == 'Args' else 'Raises'}:\n\n" + "\n".join(lines)
    if title:
        return wrapped(f"{title}: {' '.join(text.split())}")
    return "\n\n".join(paragraph(part) for part in re.split(r"\n\s*\n", text))


def split_item(item: str) -> tuple[str, str, str]:
    return item.partition(":")


def paragraph(text: str) -> str:
    """A paragraph wrapped; a list keeps its items."""
    if re.match(r"\s*[-*] ", text):
        return "\n".join(wrapped(" ".join(item.split()), "  ") for item in re.split(r"\n(?=\s*[-*] )", text))
    return wrapped(" ".join(text.split()))


def wrapped(text: str, indent: str = "") -> str:
    """Lines of at most `WIDTH`, code spans whole."""
    whole = re.sub(r"`[^`]+`", lambda span: span[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(whole, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def command_entries(name: str) -> Iterator[str]:
    """A command, or the commands of a group."""
    command: Any = get_command(_app(name)).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    inner: dict[str, Any] = getattr(command, "commands", {})
    for words, one in {f"{name} {key}": value for key, value in inner.items()}.items() if inner else [(name, command)]:
        yield command_entry(words, one)


def command_entry(words: str, command: Any) -> str:
    """Usage, what it does, and every option with its help."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    text = f"### `molehunt {words}`\n\n{markdown(inspect.cleandoc(command.help or ''))}\n\n"
    lines = [f"- `{(one.metavar or one.name).upper().strip('{}')}`: {one.help}" for one in arguments]
    lines += [f"- {names_of(one)}: {one.help}{default_of(one)}" for one in options]
    return text + "\n".join(wrapped(line, "  ") for line in lines) + "\n\n"


def names_of(option: Any) -> str:
    """Every way to write an option."""
    return ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def default_of(option: Any) -> str:
    """What holds where the option is left out, in words."""
    if option.required:
        return " Required."
    if isinstance(option.show_default, str):
        return f" Default: {option.show_default}."
    plain = option.default is not None and option.default not in ((), []) and not isinstance(option.default, bool)
    return f" Default: `{option.default}`." if plain and not callable(option.default) else ""


def main() -> None:
    """Write the page, or with --check compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail where the page is out of date.")
    made = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text() != made:
            sys.exit("docs/reference.md is out of date: run python tools/reference.py")
        return
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
