"""Whatever ends a command, its exit code is 1 only where something was flagged, and the message is one for people."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from molehunt.cli import main as cli
from molehunt.cli.options import AsJson
from molehunt.cli.outside_errors import outside_error
from molehunt.errors import InvalidInput, UsageError
from molehunt.run.whole import replace_whole


def panic() -> BaseException:
    """The exception of a library in Rust that broke; it is no Exception."""
    kind = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    return kind("index out of bounds: the len is 0 but the index is 5 \x1b[2J")


def system(number: int, name: str = "out/units") -> OSError:
    return OSError(number, os.strerror(number), name)


CASES: list[tuple[str, BaseException, int, str]] = [
    ("panic", panic(), 4, "index out of bounds"),
    ("memory", MemoryError(), 4, "Out of memory"),
    ("torch's memory", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 4, "Out of"),
    ("a GPU's memory", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 4, "Out of memory"),
    ("recursion", RecursionError("maximum recursion depth exceeded"), 4, "nested too deeply"),
    ("surrogate", UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates not allowed"), 4, "no Unicode"),
    ("not text", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 4, "no Unicode"),
    ("disk full", system(errno.ENOSPC), 2, "The disk is full"),
    ("quota", system(errno.EDQUOT), 2, "share of the disk"),
    ("read-only", system(errno.EROFS), 2, "read-only"),
    ("no permission", system(errno.EACCES), 2, "permissions"),
    ("long name", system(errno.ENAMETOOLONG), 2, "shorter name"),
    ("not a folder", system(errno.ENOTDIR), 2, "out/units"),
    ("a folder", system(errno.EISDIR), 2, "out/units"),
    ("not there", system(errno.ENOENT), 2, "out/units"),
    ("a loop of links", system(errno.ELOOP), 2, "links"),
    ("a library's own OSError", OSError("cannot make sense of tokenizer.json"), 4, "cannot make sense"),
    ("tokenizers' own error", Exception("data did not match any variant of untagged enum"), 4, "did not match"),
    ("safetensors on a full disk", ValueError("I/O error: No space left on device (os error 28)"), 2, "The disk is full"),
]  # fmt: skip


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let `molehunt files` raise something."""

    def install(error: BaseException) -> None:
        def files(as_json: AsJson = False) -> None:
            raise error

        module = ModuleType("molehunt.cli.files")
        module.files = files  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "molehunt.cli.files", module)

    return install


def leave(*args: str) -> object:
    with pytest.raises(SystemExit) as left:
        cli.main(args)
    return left.value.code


@pytest.mark.parametrize(("error", "code", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_no_fault_of_ours_has_its_code_and_one_message(error, code, message, failing, capsys) -> None:
    failing(error)
    assert leave("files") == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and "fault in Molehunt" not in shown.err
    assert shown.out == "" and "\x1b" not in shown.err
    assert leave("files", "--json") == code
    payload = json.loads(capsys.readouterr().out)
    assert payload["exit_code"] == code and message in payload["error"]


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError(), RuntimeError("shapes differ"), SystemExit(1), SystemExit("no")]
)
def test_a_fault_stays_a_fault_and_is_never_a_finding(error: BaseException, failing, capsys) -> None:
    failing(error)
    assert leave("files") == 70
    shown = capsys.readouterr().err
    assert "fault in Molehunt" in shown or "A library ended the program" in shown
    assert outside_error(error) is None


def test_a_panic_of_the_real_tokenizers_is_no_finding(failing, capsys) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    made = json.loads(Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
    made["model"]["continuing_subword_prefix"] = "##"
    raised: BaseException | None = None
    try:
        Tokenizer.from_str(json.dumps(made))
    except BaseException as error:  # of a class that nobody can import
        raised = error
    assert raised is not None
    failing(raised)
    assert leave("files") == 4
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and "slice" in shown


def test_a_library_that_cannot_write_is_an_error_of_the_system(tmp_path: Path) -> None:
    """In a child, because the limit cannot be lifted again."""
    code = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom safetensors.torch import save_file\n"
        "from molehunt.run.whole import replace_whole\nresource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: replace_whole(Path(sys.argv[1]), lambda p: save_file({'a': torch.zeros(5000)}, p))\n"
        "except OSError as error: print(error.errno, error.filename)\n"
    )
    target = tmp_path / "state.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert done.stdout == f"{errno.EFBIG} {target}\n", done.stderr
    assert list(tmp_path.iterdir()) == []
    replace_whole(target, lambda path: save_file({"a": torch.zeros(3)}, path))
    assert target.is_file()


COMMAND = """
import os, sys, types
module = types.ModuleType("molehunt.cli.files")
def files(as_json: bool = False):
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.cli.output import show, show_json
    say("starting \\u2026 \\x1b[2J")
    for _ in track_on_stderr(range(3), "reading \\u4e2d"):
        pass
    (show_json if as_json else show)({"name": "\\u4e2d \\u202e \\ud800"} if as_json else "name \\u4e2d \\u202e \\ud800")
    import typer
    raise typer.Exit(int(os.environ.get("ENDS", "0")))
module.files = files
sys.modules["molehunt.cli.files"] = module
from molehunt.cli.main import main
main(sys.argv[1:])
"""


def at_a_shell(words: str, *, ends: int = 0, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command above with redirections of a shell."""
    kept = {name: value for name, value in os.environ.items() if name not in {"HOME", "LANG", "PYTHONUTF8"}}
    here = ["sh", "-c", f'exec "$0" -c "$1" files {words}', sys.executable, COMMAND]
    return subprocess.run(here, capture_output=True, cwd=cwd, env={**kept, "ENDS": str(ends), **env}, timeout=60)


@pytest.mark.parametrize("words", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full_change_no_verdict(words: str) -> None:
    done = at_a_shell(words, ends=3)
    assert done.returncode == 3 and b"Traceback" not in done.stderr


def test_a_result_that_cannot_be_written_is_an_error_and_never_a_finding() -> None:
    done = at_a_shell(">/dev/full", ends=0)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert b"No space left" in done.stderr
    assert at_a_shell(">/dev/full 2>/dev/full", ends=0).returncode == 2


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1:strict"}],
    ids=str,
)  # fmt: skip
def test_every_encoding_of_the_terminal_shows_every_text(env: dict[str, str], tmp_path: Path) -> None:
    done = at_a_shell("", **env)
    assert (done.returncode, done.stdout) == (0, rb"name \u4e2d \u202e \ud800" + b"\n"), done.stderr
    done = at_a_shell("--as-json", **env)
    assert json.loads(done.stdout) == {"name": "\u4e2d \u202e \ud800"} and done.stdout.isascii()


def test_no_home_a_narrow_terminal_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    done = at_a_shell("", cwd=folder, COLUMNS="1", TERM="dumb", XDG_CACHE_HOME="/nonexistent")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert at_a_shell("--help", COLUMNS="1").returncode == 0


def test_errors_for_the_user_are_as_they_were(failing, capsys) -> None:
    failing(InvalidInput("cut short"))
    assert leave("files") == 4 and capsys.readouterr().err == "cut short\n"
    failing(UsageError("odd \x9b31m"))
    assert leave("files") == 2 and capsys.readouterr().err == "odd \\x9b31m\n"
