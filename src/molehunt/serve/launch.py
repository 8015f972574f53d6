"""Start a guarded server: check its options, calibrate or resume its watch, and listen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molehunt.errors import UsageError, printable, terminal_text
from molehunt.report.watch_text import suspects
from molehunt.run.progress import Track, silent
from molehunt.serve import server
from molehunt.serve.app import Settings
from molehunt.serve.guard import Guard
from molehunt.serve.keys import LOOPBACK, Keys, new_key
from molehunt.serve.steering import Edit
from molehunt.watch.alert import Action
from molehunt.watch.ledger import Ledger
from molehunt.workflows.inputs import Texts
from molehunt.workflows.watch_target import STATE, calibrated_state, open_target


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of a server.

    Raises:
        UsageError: options that do not fit together.
    """

    action: Action = "flag"
    """Action on a flagged answer."""
    edit: Edit = "project"
    """Edit of the top-scoring directions by the action `steer`."""
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    """The key that clients give; None makes a new one."""
    name: str | None = None
    """Name of the model in requests and answers; None takes the folder's name."""
    clean: Texts | None = None
    clean_rows: int = 2000
    fpr: float = 0.01
    trust_clean: bool = False
    max_new_tokens: int = 64
    ledger: str | None = None
    """URL of the alerts; None takes a file in `out`."""
    no_text: bool = False
    log_text: bool = False
    max_batch: int = 16
    backend: Literal["eager", "continuous"] = "eager"
    adapter: bool | None = None
    device: str = "cpu"
    out: Path = Path("serve")
    """Folder for state, alerts and request log, in which a server resumes."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.no_text and self.log_text:
            raise UsageError("--no-text and --log-text say opposite things.")
        if self.key is None and self.host not in LOOPBACK:
            raise UsageError(
                f"{self.host} can be reached by others: give a key of yours with --key-file or $MOLEHUNT_KEY."
            )


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A server that accepts connections."""

    url: str
    key: str
    """The key that clients give."""
    new_key: bool
    """Whether the key was made by this start."""
    model: str
    action: Action

    def to_dict(self) -> dict[str, Any]:
        """The fields that a script needs to use the server."""
        return {"url": self.url, "key": self.key, "model": self.model, "action": self.action}

    def summary(self) -> str:
        """Addresses and key for the person at the terminal."""
        return terminal_text(
            f"{self.url}  live page; OpenAI base URL {self.url}/v1, model {self.model!r}, action {self.action}\n"
            f"Key: {self.key if self.new_key else 'as given'}"
        )


def read_key(file: Path) -> str:
    """The key in a file. Raises UsageError for a file that cannot be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the key file {printable(str(file))} cannot be read: {printable(str(error))}") from None


def launch(
    base: str,
    tuned: str,
    options: ServeOptions,
    *,
    listening: Callable[[Launched], None],
    notice: Callable[[str], None],
    track: Track = silent,
) -> None:
    """Calibrate or resume, and serve until SIGINT or SIGTERM.

    Args:
        listening: called once connections are accepted.
        notice: called with a text about suspicious clean rows, where there are any.

    Raises:
        UsageError: the key could be guessed, the address cannot be listened on, or the backend cannot run this model.
        NotTestable: nothing changed that could be watched, or too few clean rows for the rate.
        LedgerUnavailable: alerts cannot be stored.
    """
    key = options.key or new_key()
    keys = Keys(key)
    target = open_target(
        base, tuned, clean=options.clean, clean_rows=options.clean_rows, fpr=options.fpr, seed=options.seed,
        max_new_tokens=options.max_new_tokens, adapter=options.adapter, device=options.device, track=track,
    )  # fmt: skip
    state = calibrated_state(
        target, fpr=options.fpr, max_new_tokens=options.max_new_tokens, out=options.out, seed=options.seed,
        trust_clean=options.trust_clean, no_text=options.no_text, track=track,
    )  # fmt: skip
    if excluded := suspects(state.suspects):
        notice(excluded)
    settings = _settings(options, options.name or Path(tuned).name or "model")
    url = options.ledger or f"sqlite:///{(options.out / 'alerts.sqlite').absolute()}"
    with Ledger(url, no_text=options.no_text) as alerts:
        guard = Guard(
            target.bank, state, alerts, target.pair.tokenizer, fpr=options.fpr, action=options.action,
            edit=options.edit, state_file=options.out / STATE,
        )  # fmt: skip

        def accepted(address: str) -> None:
            made = options.key is None
            listening(Launched(url=address, key=key, new_key=made, model=settings.model_name, action=options.action))

        server.run_server(target.pair, guard, keys, settings, host=options.host, port=options.port, listening=accepted)


def _settings(options: ServeOptions, model_name: str) -> Settings:
    return Settings(
        model_name=model_name,
        hosts=frozenset(LOOPBACK) if options.host in LOOPBACK else None,
        default_new_tokens=options.max_new_tokens,
        backend=options.backend,
        max_batch=options.max_batch,
        request_log=options.out / "requests.jsonl",
        log_text=options.log_text,
    )
