"""`molehunt serve`: an OpenAI-compatible server whose every token is scored."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Clean, CleanRows, Device, Fpr, NoText, Seed, TrustClean, Tuned
from molehunt.cli.output import show_json
from molehunt.run.extras import install_command

KEY = "MOLEHUNT_KEY"
OUT = Path("serve")
EXTRA = ("fastapi", "uvicorn", "prometheus_client", "starlette")
"""Packages of the extra that a server needs."""

ActionOption: TypeAlias = Annotated[
    Literal["log", "flag", "block", "steer"],
    typer.Option(
        help="What happens to a flagged answer. log: an alert is recorded. flag: the client is informed, too. block: it "
        "ends before its next token. steer: it goes on with its top-scoring directions removed."
    ),
]
EditOption: TypeAlias = Annotated[
    Literal["project", "clip"],
    typer.Option(
        help="With --action steer: project the top-scoring directions out, or clip them to the range of clean answers."
    ),
]
Host: TypeAlias = Annotated[
    str, typer.Option(help="Address to listen on. Any address but loopback needs a key of yours.")
]
Port: TypeAlias = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
KeyFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="File with the key that clients give.", show_default=f"${KEY}, else a new key is printed"),
]
Name: TypeAlias = Annotated[
    str | None, typer.Option(help="Name of the model in requests and answers.", show_default="the folder's name")
]
MaxNewTokens: TypeAlias = Annotated[
    int,
    typer.Option(
        min=1,
        help="Greatest number of tokens of an answer where a request does not set one, and of calibration answers.",
    ),
]
LedgerUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--ledger", help="URL of the alerts: sqlite:///FILE or postgresql://…", show_default="alerts.sqlite in --out"
    ),
]
LogText: TypeAlias = Annotated[bool, typer.Option("--log-text", help="Write prompts and answers to the request log.")]
MaxBatch: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Greatest number of answers that are generated together.")
]
BackendOption: TypeAlias = Annotated[
    Literal["eager", "continuous"],
    typer.Option(
        help="How a batch is run. eager: rows are padded to one length. continuous: rows are packed, as transformers' "
        "continuous batching schedules them."
    ),
]
Out: TypeAlias = Annotated[
    Path,
    typer.Option("--out", help="Folder for state, alerts and request log. A server resumes in its folder."),
]


def serve(
    base: Base,
    tuned: Tuned,
    action: ActionOption = "flag",
    edit: EditOption = "project",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    key_file: KeyFile = None,
    name: Name = None,
    clean: Clean = None,
    clean_rows: CleanRows = 2000,
    fpr: Fpr = 0.01,
    trust_clean: TrustClean = False,
    max_new_tokens: MaxNewTokens = 64,
    ledger: LedgerUrl = None,
    no_text: NoText = False,
    log_text: LogText = False,
    max_batch: MaxBatch = 16,
    backend: BackendOption = "eager",
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Out = OUT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a fine-tune behind a guard that watches its weight directions, with a live page at /.

    OpenAI's /v1/chat/completions and /v1/completions, /health, /ready and /metrics. Every route but /health needs the key.
    """
    import os

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import UsageError

    try:
        from molehunt.serve.launch import Launched, ServeOptions, launch, read_key
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise UsageError(f"the server needs more packages: {install_command('serve')}") from None
    options = ServeOptions(
        action=action, edit=edit, host=host, port=port, name=name, clean=clean, clean_rows=clean_rows, fpr=fpr,
        trust_clean=trust_clean, max_new_tokens=max_new_tokens, ledger=ledger, no_text=no_text, log_text=log_text,
        max_batch=max_batch, backend=backend, adapter=adapter, device=device, out=out, seed=seed,
        key=read_key(key_file) if key_file is not None else os.environ.get(KEY),
    )  # fmt: skip

    def listening(server: Launched) -> None:
        if as_json:
            show_json(server.to_dict(), indent=None)
        else:
            say(server.summary())

    launch(base, tuned, options, listening=listening, notice=say, track=track_on_stderr)
