"""The shape of the project, held by its own source: directions of import, catalogues, what is never done."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from molehunt.contracts import Detector, Intervention

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "molehunt"
# fmt: off
ORDER = [
    "run", "checkpoint", "traffic", "model", "measure", "organism", "activation", "direction", "dictionary", "detect",
    "steer", "transfer", "stress", "watch", "audit", "bench", "report", "workflows", "serve", "cli",
]
# fmt: on
"""Each folder may import from those before it."""
ALLOWED_TO_ALL = {"", "contracts", "errors", "site"}
CONTRACTS = {"detect": Detector, "steer": Intervention}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__main__.py")  # `-m` is the command
MODULES = {"molehunt." + path.relative_to(PACKAGE).as_posix()[:-3].replace("/", ".") for path in SOURCES}
MODULES |= {f"molehunt.{path.relative_to(PACKAGE).parent.as_posix().replace('/', '.')}" for path in SOURCES}
PLACE = re.compile(r"molehunt(\.\w+)+:\w+")
HEAVY = ("torch", "transformers", "peft", "scipy", "numpy")


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


every_source = pytest.mark.parametrize("path", SOURCES, ids=name)


def imported(path: Path, *, rows: bool = True) -> Iterator[str]:
    """Dotted names inside the package, without its own name: `model.pair`, `errors`.

    Imports inside functions and under TYPE_CHECKING count, too, and so do the `rows` of a catalogue.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dotted = [f"{node.module}.{a.name}" for a in node.names]
            dotted = [one if one in MODULES else node.module or "" for one in dotted]
        elif rows and isinstance(node, ast.Constant) and isinstance(node.value, str) and PLACE.fullmatch(node.value):
            dotted = [node.value.partition(":")[0]]  # a catalogue's row, imported when its name is used
        else:
            continue
        yield from (one.removeprefix("molehunt").lstrip(".") for one in dotted if one.split(".")[0] == "molehunt")


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def spelled(node: ast.expr) -> str:
    """`torch.load` for the call's function, whatever it is."""
    return ast.unparse(node)


def test_every_folder_has_its_place() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ORDER)


@every_source
def test_imports_point_downwards_only(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        assert parts[0] in {"__init__.py", "contracts.py", "errors.py", "site.py"}
        if parts[0] != "__init__.py":  # that one names the public things, and imports them when they are used
            assert set(imported(path)) <= ({"site"} if parts[0] == "contracts.py" else set())
        return
    own = ORDER.index(parts[0])
    seen = {dotted.split(".")[0] for dotted in imported(path)} - ALLOWED_TO_ALL
    above = {folder for folder in seen if ORDER.index(folder) > own}
    assert not above, f"{name(path)} imports from {above}, which come after {parts[0]}"


@every_source
def test_nothing_is_imported_by_way_of_the_front_door(path: Path) -> None:
    """`from molehunt import audit` would hide where the name comes from, and be a function or a folder."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imports if node.module == "molehunt" for alias in node.names} <= {"__version__"}


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Also not inside functions or under TYPE_CHECKING: files of a circle cannot be understood one at a time.

    A catalogue's rows are left out: a method may read the catalogue that names it.
    """
    imports = {
        name(path)[:-3].replace("/", ".").removesuffix(".__init__"): set(imported(path, rows=False)) - {""}
        for path in SOURCES
        if path != PACKAGE / "__init__.py"
    }
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"these files import each other: {' → '.join(error.args[1])}")


@every_source
def test_nobody_imports_the_command_line(path: Path) -> None:
    if path.parent.name != "cli":
        assert not [dotted for dotted in imported(path) if dotted.split(".")[0] == "cli"]


def test_what_names_things_imports_nothing_heavy() -> None:
    light = ["molehunt", "molehunt.cli.main", "molehunt.cli.options", "molehunt.errors", "molehunt.site"]
    light += [f"molehunt.{name(path)[:-3].replace('/', '.')}" for path in PACKAGE.rglob("catalog.py")]
    code = f"import sys, {', '.join(light)}; print([m for m in {HEAVY} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr


def wraps_another(node: ast.ClassDef) -> bool:
    """A gate or a control around an intervention: it is made from one, never named."""
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return any(spelled(field.annotation) in {"Detector", "Intervention"} for field in fields)


def catalogues() -> list[tuple[str, str, str]]:
    rows = []
    for path in sorted(PACKAGE.rglob("catalog.py")):
        if path.parent.name != "run":
            folder = path.parent.relative_to(PACKAGE).as_posix().replace("/", ".")
            module = importlib.import_module(f"molehunt.{folder}.catalog")
            rows += [(folder, key, row) for key, row in module.CATALOG.items()]
    return rows


@pytest.mark.parametrize(("folder", "key", "row"), catalogues())
def test_every_row_leads_to_a_file_of_its_folder(folder: str, key: str, row: str) -> None:
    module, _, attribute = row.partition(":")
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key), "names are typed at a terminal"
    assert module.startswith(f"molehunt.{folder}.")
    found = getattr(importlib.import_module(module), attribute)
    if folder in CONTRACTS:
        required = {member for member in vars(CONTRACTS[folder]) if not member.startswith("_")} | (
            {"__call__"} if folder == "steer" else set()
        )
        fields = set(getattr(found, "__dataclass_fields__", ()))
        assert all(hasattr(found, member) or member in fields for member in required)


def iterated(path: Path) -> set[str]:
    """Names that a file goes through as a whole: in a loop, or in a call such as `names(CATALOG, GROUP)`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.For | ast.comprehension):
            found.add(spelled(node.iter).partition(".")[0])
        elif isinstance(node, ast.Call) and spelled(node.func) in {"names", "sorted", "list", "tuple", "set"}:
            found |= {spelled(argument) for argument in node.args}
        elif isinstance(node, ast.Dict):  # `{**FROM_MOMENTS, **FROM_ACTIVATIONS}`
            found |= {spelled(value) for key, value in zip(node.keys, node.values, strict=True) if key is None}
    return found


def test_every_catalogue_is_gone_through_by_a_command_or_workflow() -> None:
    """A table that only `load` or a test reads hides the methods of plugins."""
    unread: list[str] = []
    for catalog in sorted(PACKAGE.rglob("catalog.py")):
        if catalog == PACKAGE / "run" / "catalog.py":
            continue
        module = name(catalog)[:-3].replace("/", ".")
        users = [path for path in SOURCES if path != catalog and module in set(imported(path))]
        if not users or "CATALOG" not in {one for path in (catalog, *users) for one in iterated(path)}:
            unread.append(name(catalog))
    assert not unread


@pytest.mark.parametrize(
    ("folder", "method", "argument"), [("detect", "score", "reading"), ("steer", "__call__", "acts")]
)
def test_every_class_of_a_contract_has_a_row(folder: str, method: str, argument: str) -> None:
    rows = importlib.import_module(f"molehunt.{folder}.catalog").CATALOG.values()
    written = [
        f"molehunt.{folder}.{path.stem}:{node.name}"
        for path in sorted((PACKAGE / folder).glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not wraps_another(node)
        for member in node.body
        if isinstance(member, ast.FunctionDef) and member.name == method
        if argument in {a.arg for a in member.args.args}
        if member.returns is None or "Bool" not in ast.unparse(member.returns)  # a gate says where, and edits nothing
    ]
    assert written, "the search itself works"
    assert sorted(written) == sorted(rows)


@every_source
def test_a_file_is_named_for_what_it_does(path: Path) -> None:
    assert not re.search(r"util|helper|common|misc|manager", name(path))


@every_source
def test_nothing_from_a_checkpoint_is_executed(path: Path) -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not forbidden & {module.split(".")[0] for module in modules}
    for call in calls(path):
        given = {keyword.arg: spelled(keyword.value) for keyword in call.keywords}
        function = spelled(call.func)
        where = f"{name(path)}:{call.lineno}"
        assert given.get("trust_remote_code", "False") == "False", where
        assert given.get("allow_pickle", "False") == "False", where
        assert function not in {"eval", "exec"}, where
        if re.search(r"\bAuto\w+\.from_(pretrained|config)$", function):
            assert "trust_remote_code" in given, f"{where}: say trust_remote_code=False"
        if function == "torch.load":
            assert given.get("weights_only") == "True", where


@every_source
def test_one_file_alone_names_the_argument_of_a_models_cache(path: Path) -> None:
    if name(path) == "model/cache.py":
        return
    text = path.read_text()
    assert not re.search(r"past_key_values|cache_params", text)
    for call in calls(path):
        given = {keyword.arg: spelled(keyword.value) for keyword in call.keywords}
        assert "cache" not in given and given.get("use_cache", "False") == "False", f"{name(path)}:{call.lineno}"
    assert not re.search(r"""(\.get\(|\[)["']cache["']""", text), "a hook that reads the call by one name"


UNWATCHED = {"model/mixed_rows.py", "organism/train.py", "serve/packed.py", "serve/vllm_plugin.py"}
"""Files whose hooks are part of how a model runs, or of a run without any check of it."""


@every_source
def test_hooks_do_not_see_passes_that_only_look_at_the_model(path: Path) -> None:
    for call in calls(path):
        if re.search(r"\.register_forward(_pre)?_hook$", spelled(call.func)) and name(path) not in UNWATCHED:
            assert spelled(call.args[0]).startswith("live("), f"{name(path)}:{call.lineno}"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / file for file in listed.stdout.split("\0") if file]


def test_no_file_names_a_path_of_one_machine() -> None:
    text = {".py", ".md", ".toml", ".json", ".jsonl", ".yaml", ".yml", ".j2", ".html", ".txt", ".css", ""}
    private = re.compile(rb"(?<![\w./])/(work|root|home|Users)/\w")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in tracked()
        if path.suffix in text and path.is_file() and private.search(path.read_bytes())
    ]
    assert found == []
