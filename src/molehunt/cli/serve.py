"""`molehunt serve`: an OpenAI-compatible server whose every token is scored."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Clean, CleanRows, Device, Fpr, NoText, Seed, TrustClean, Tuned

KEY = "MOLEHUNT_KEY"
OUT = Path("serve")


def serve(
    base: Base,
    tuned: Tuned,
    action: Annotated[
        Literal["log", "flag", "block", "steer"],
        typer.Option(
            help="What happens to a flagged answer: only an alert; told to the client; ended before its next token; or "
            "continued with the directions that gave it away taken out."
        ),
    ] = "flag",
    edit: Annotated[
        Literal["project", "clip"],
        typer.Option(
            help="With --action steer: take the loudest directions out, or hold them to what clean answers show."
        ),
    ] = "project",
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need a key of yours.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(help="File with the key that clients give.", show_default=f"${KEY}, else a new key is printed"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model on the wire.", show_default="the folder's name")
    ] = None,
    clean: Clean = None,
    clean_rows: CleanRows = 2000,
    fpr: Fpr = 0.01,
    trust_clean: TrustClean = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer where a request does not say; calibration answers, too.")
    ] = 64,
    ledger: Annotated[
        str | None,
        typer.Option(help="URL of the alerts: sqlite:///FILE or postgresql://…", show_default="alerts.sqlite in --out"),
    ] = None,
    no_text: NoText = False,
    log_text: Annotated[bool, typer.Option("--log-text", help="Write prompts and answers to the request log.")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are generated together.")] = 16,
    backend: Annotated[
        Literal["eager", "continuous"],
        typer.Option(
            help="How they are: padded to one length; or packed, as transformers' continuous batching schedules them."
        ),
    ] = "eager",
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Annotated[
        Path, typer.Option("--out", help="Folder for state, alerts and request log; a server resumes there.")
    ] = OUT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a fine-tune behind a guard that watches its weight directions, with a live page at /.

    OpenAI's /v1/chat/completions and /v1/completions, /health, /ready and /metrics. Every route but /health needs the key.
    """
    from molehunt.errors import UsageError

    if no_text and log_text:
        raise UsageError("--no-text and --log-text say opposite things.")
    try:
        from molehunt.serve.server import run_server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise UsageError("the server needs more packages: pip install 'molehunt[serve]'") from None
    from molehunt.cli.console import say
    from molehunt.cli.watching import begin, opened
    from molehunt.report.watch_told import suspects
    from molehunt.serve.app import Settings
    from molehunt.serve.guard import Guard
    from molehunt.serve.keys import LOOPBACK, Keys, new_key
    from molehunt.watch.ledger import Ledger

    given = _read_key(key_file) if key_file is not None else os.environ.get(KEY)
    if given is None and host not in LOOPBACK:
        raise UsageError(f"{host} can be reached by others: give a key of yours with --key-file or ${KEY}.")
    key = given or new_key()
    keys = Keys(key)
    found = opened(
        base,
        tuned,
        clean=clean,
        clean_rows=clean_rows,
        fpr=fpr,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
        device=device,
        seed=seed,
    )
    watching = begin(
        found,
        fpr=fpr,
        max_new_tokens=max_new_tokens,
        out=out,
        seed=seed,
        trust_clean=trust_clean,
        no_text=no_text,
    )
    if told := suspects(watching.state.suspects):
        say(told)
    settings = Settings(
        model_name=name or Path(tuned).name or "model",
        hosts=frozenset(LOOPBACK) if host in LOOPBACK else None,
        default_new_tokens=max_new_tokens,
        backend=backend,
        max_batch=max_batch,
        request_log=out / "requests.jsonl",
        log_text=log_text,
    )
    with Ledger(ledger or f"sqlite:///{(out / 'alerts.sqlite').absolute()}", no_text=no_text) as alerts:
        guard = Guard(
            watching.bank,
            watching.state,
            alerts,
            watching.pair.tokenizer,
            fpr=fpr,
            action=action,
            edit=edit,
            state_file=watching.state_file,
        )

        def listening(url: str) -> None:
            if as_json:
                import json

                typer.echo(json.dumps({"url": url, "key": key, "model": settings.model_name, "action": action}))
            else:
                say(f"{url}  live page; OpenAI base URL {url}/v1, model {settings.model_name!r}, action {action}")
                say(f"Key: {key}" if given is None else "Key: as given")

        run_server(watching.pair, guard, keys, settings, host=host, port=port, listening=listening)


def _read_key(file: Path) -> str:
    from molehunt.errors import UsageError, printable

    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the key file {printable(str(file))} cannot be read: {printable(str(error))}") from None
