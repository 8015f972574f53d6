"""`molehunt stress`: try to make a suppressed behaviour recover while the fix stays active."""

from pathlib import Path

from molehunt.cli.options import Adapter, AsJson, Base, Device, Seed, Tuned
from molehunt.cli.output import show, show_json
from molehunt.cli.stress_options import (
    ClampMode,
    ClampValue,
    CleanPrompts,
    DictionaryFolder,
    Exclude,
    Features,
    FixFile,
    Layer,
    Limit,
    Match,
    MaxNewTokens,
    MaxNorm,
    OutFolder,
    Positions,
    Prompts,
    Rows,
    Steps,
    Suffixes,
)

RECOVERABLE = 1


def stress(
    base: Base,
    tuned: Tuned,
    prompts: Prompts,
    match: Match = None,
    exclude: Exclude = None,
    dictionary: DictionaryFolder = None,
    features: Features = None,
    mode: ClampMode = "set",
    value: ClampValue = 0.0,
    layer: Layer = None,
    fix: FixFile = None,
    clean: CleanPrompts = None,
    rows: Rows = 48,
    positions: Positions = 1,
    max_norm: MaxNorm = 8.0,
    steps: Steps = 40,
    suffixes: Suffixes = False,
    max_new_tokens: MaxNewTokens = 24,
    limit: Limit = 100,
    adapter: Adapter = None,
    device: Device = "cpu",
    out: OutFolder = Path("stress"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Attack a fix while it stays active: does the behaviour recover, at which length, and would any other answer?"""
    options = {name: given for name, given in locals().items() if name != "as_json"}
    import shlex
    import sys

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows import stress as workflow  # torch stays out of --help

    command = shlex.join(["molehunt", *sys.argv[1:]])
    result = workflow.stress(**options, command=command, track=track_on_stderr)
    if as_json:
        show_json(result.to_dict())
    else:
        show(result.summary())
        say(f"\ncertificate: {out / 'certificate.json'}\npage: {out / 'stress.html'}")
    return RECOVERABLE if result.verdict == "RECOVERABLE" else 0
