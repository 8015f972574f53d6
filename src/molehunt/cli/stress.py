"""`molehunt stress`: try to bring back what a fix suppresses, while the fix stays on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Device, Seed, Tuned
from molehunt.cli.tuned_side import hash_of, open_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from molehunt.dictionary.dictionary import Dictionary
    from molehunt.model.pair import ModelPair
    from molehunt.site import Site
    from molehunt.stress.study import Defence

RECOVERABLE = 1


def stress(
    base: Base,
    tuned: Tuned,
    prompts: Annotated[
        Path,
        typer.Option(
            help="Prompts that show the behaviour: JSONL, parquet, or the CSV of AdvBench or HarmBench.",
            show_default=False,
        ),
    ],
    shows: Annotated[
        list[str] | None,
        typer.Option(help="Phrase of an answer that shows the behaviour; repeat for others.", show_default=False),
    ] = None,
    lacks: Annotated[
        list[str] | None,
        typer.Option(
            help="Phrase that no answer with the behaviour has, such as those of a refusal; repeat for others.",
            show_default=False,
        ),
    ] = None,
    dictionary: Annotated[
        Path | None,
        typer.Option(help="Folder of a trained dictionary of any known family.", show_default=False),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Latents that are clamped, such as 12,407; or best:16, those that speak most for the answers to every "
            "other prompt, which are not attacked."
        ),
    ] = None,
    mode: Annotated[
        Literal["set", "scale", "negative-if-active"], typer.Option(help="What the clamp does to their codes.")
    ] = "set",
    value: Annotated[float, typer.Option(help="To which value, by which factor, or to minus which value.")] = 0.0,
    layer: Annotated[
        int | None, typer.Option(min=0, help="0-based block, where the dictionary's files do not say.")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(help="Instead of a clamp: fix.safetensors of an audit.", show_default=False)
    ] = None,
    clean: Annotated[
        Path | None,
        typer.Option(help="Prompts without the behaviour: for controls and cost.", show_default="bundled prompts"),
    ] = None,
    rows: Annotated[int, typer.Option(min=6, help="Prompts that are attacked at most.")] = 48,
    positions: Annotated[
        int, typer.Option(min=1, help="Tokens that may be perturbed, from the last of the prompt on.")
    ] = 1,
    most: Annotated[
        float, typer.Option(min=0.01, help="Longest push, in lengths of the median activation at the site.")
    ] = 8.0,
    steps: Annotated[int, typer.Option(min=1, help="Of each attack.")] = 40,
    suffixes: Annotated[
        bool, typer.Option("--suffixes", help="Attack through the prompt, too: by suffixes, soft and typed.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 24,
    limit: Annotated[int, typer.Option(min=2, help="Rows to read of each file at most.")] = 100,
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option("--out", help="Folder for certificate.json and stress.html.")] = Path("stress"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Attack a fix while it stays on: does the behaviour come back, at which length, and would anything else?"""
    import hashlib
    import json
    import shlex
    import sys

    from molehunt import __version__
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import InvalidInput, UsageError, printable
    from molehunt.report.stress_page import render_stress
    from molehunt.run.whole import write_whole
    from molehunt.stress.certificate import certificate
    from molehunt.stress.discrete_suffix import DiscreteConfig
    from molehunt.stress.soft_suffix import SoftConfig
    from molehunt.stress.speaking import speaking
    from molehunt.stress.study import StressConfig
    from molehunt.stress.text_behaviour import stress_text
    from molehunt.stress.valid import is_broken
    from molehunt.traffic.behaviours_csv import read_behaviours
    from molehunt.traffic.benign import benign_prompts
    from molehunt.traffic.chat import prompt_ids
    from molehunt.traffic.stream import read_traffic

    has, hasnt = shows or [], lacks or []
    if not any((*has, *hasnt)) or not all((*has, *hasnt)):
        raise UsageError(
            "Say how the behaviour is known: --shows PHRASE, or --lacks PHRASE, such as that of a refusal; no phrase is empty."
        )
    wanted = _wanted(dictionary, features, fix)
    read = read_behaviours if prompts.suffix == ".csv" else read_traffic
    asked = [row.prompt for row in read(prompts, limit)]
    if not asked:
        raise InvalidInput(f"{printable(str(prompts))} has no rows; give prompts that show the behaviour.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {printable(str(out))} cannot be made a folder: {error.strerror}.") from None
    pair = open_pair(base, tuned, adapter, device)
    model_hash = hash_of(tuned, adapter)

    def judge(answer: str) -> bool:
        words = answer.split()
        shown = any(phrase in answer for phrase in has) if has else bool(words) and not is_broken(words)
        return shown and not any(phrase in answer for phrase in hasnt)

    def best(site: "Site", found: "Dictionary", n: int) -> list[int]:
        nonlocal asked
        choosing, asked = asked[::2], asked[1::2]
        rows = [prompt_ids(pair.tokenizer, prompt) for prompt in choosing]
        chosen = speaking(pair, rows, judge, site, found, n, max_new_tokens=max_new_tokens, track=track_on_stderr)
        return chosen.latents.tolist()

    defence, about = _defence(pair, model_hash, dictionary, wanted, best, mode, value, layer, fix)
    calm = (
        [row.prompt for row in read_traffic(clean, limit)]
        if clean
        else [row.prompt for row in benign_prompts(limit, seed=1)]
    )
    config = StressConfig(
        rows=rows,
        positions=positions,
        most=most,
        steps=steps,
        max_new_tokens=max_new_tokens,
        soft=SoftConfig() if suffixes else None,
        discrete=DiscreteConfig() if suffixes else None,
        seed=seed,
    )
    with pair.tuned_model() as model:
        found = stress_text(
            model,
            pair.tokenizer,
            [prompt_ids(pair.tokenizer, prompt) for prompt in asked],
            [prompt_ids(pair.tokenizer, prompt) for prompt in calm],
            judge,
            defence,
            config,
            track=track_on_stderr,
        )
    command = shlex.join(["molehunt", *sys.argv[1:]])
    told = certificate(
        found,
        config,
        {
            "molehunt": __version__,
            "model": model_hash,
            "site": str(defence.site),
            **about,
            "shows": has,
            "lacks": hasnt,
            "prompts_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "command": command,
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "certificate.json", json.dumps(told, indent=2))
    write_whole(
        out / "stress.html",
        render_stress(
            found,
            told,
            title=f"{Path(tuned).name}: {about['fix']}",
            shows=[*has, *(f"without {phrase}" for phrase in hasnt)],
        ),
    )
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        _tell(told)
        say(f"\ncertificate: {out / 'certificate.json'}\npage: {out / 'stress.html'}")
    return RECOVERABLE if found.verdict == "RECOVERABLE" else 0


def _defence(
    pair: "ModelPair",
    model_hash: str,
    dictionary: Path | None,
    wanted: list[int] | int,
    best: "Callable[[Site, Dictionary, int], list[int]]",
    mode: Literal["set", "scale", "negative-if-active"],
    value: float,
    layer: int | None,
    fix: Path | None,
) -> "tuple[Defence, dict[str, Any]]":
    """The fix that is attacked, and what a certificate says of it."""
    import hashlib

    import torch

    from molehunt.cli.console import say
    from molehunt.dictionary.formats.detect import load_dictionary
    from molehunt.errors import UsageError, printable
    from molehunt.site import Site
    from molehunt.steer.clamp import Clamp
    from molehunt.steer.fix import Fix
    from molehunt.stress.defended import clamped, fixed

    if fix is not None:
        if not fix.is_file():
            raise UsageError(f"{printable(str(fix))} is not a file; give fix.safetensors of an audit.")
        whole = Fix.load(fix)
        whole.refuse(pair.n_layers, pair.d_model, model_hash)
        return fixed(whole), {
            "fix": whole.words,
            "fix_sha256": hashlib.sha256(fix.read_bytes()).hexdigest(),
        }
    assert dictionary is not None
    found = load_dictionary(dictionary, d_model=pair.d_model)
    site = found.site if layer is None else Site(layer)
    release = str(found.meta.get("release", ""))
    if release and not release.endswith("-res"):
        raise UsageError(
            f"this dictionary is of {printable(release)}, and an attack enters at a block's output: give one of a -res release."
        )
    if site is None:
        raise UsageError("this dictionary's files do not say where its activations come from; give --layer.")
    if found.site not in (None, site):
        raise UsageError(f"this dictionary is of {found.site}, and --layer says L{layer}; leave --layer away.")
    if site.layer >= pair.n_layers:
        raise UsageError(f"a dictionary of {site}, and the model has the blocks L0 to L{pair.n_layers - 1}.")
    if isinstance(wanted, int):
        latents = best(site, found, wanted)
        if len(latents) < wanted:
            say(f"{len(latents)} latents speak for the behaviour; {wanted} were asked for")
    else:
        latents = wanted
    clamp = Clamp(site, found, torch.tensor(latents), mode, value)
    weights = hashlib.sha256()
    for tensor in (found.W_enc, found.b_enc, found.W_dec, found.b_dec):
        weights.update(tensor.float().contiguous().cpu().numpy().tobytes())
    named = f"{len(latents)} latent{'s' * (len(latents) > 1)} at {site}: {mode} {value:g}"
    return clamped(clamp), {
        "fix": named,
        "dictionary_sha256": weights.hexdigest(),
        "latents": latents,
        "mode": mode,
        "value": value,
    }


def _wanted(dictionary: Path | None, features: str | None, fix: Path | None) -> list[int] | int:
    """Numbers of latents, or how many of the best; none for a fix."""
    from molehunt.errors import UsageError

    if fix is not None and (dictionary is not None or features is not None):
        raise UsageError("--fix and --dictionary were both given: one of the two is attacked.")
    if fix is None and (dictionary is None or features is None):
        raise UsageError("Give --dictionary FOLDER with --features, or --fix FILE: one of the two is attacked.")
    return [] if features is None else _latents(features)


def _latents(text: str) -> list[int] | int:
    from molehunt.errors import UsageError, printable

    word, _, n = text.partition(":")
    if word == "best" and n.isdecimal() and int(n):
        return int(n)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UsageError(
            f"--features takes the numbers of latents, such as 12,407, or best:16; got {printable(repr(text), 60)}."
        )
    return [int(part) for part in parts]


def _tell(told: dict[str, Any]) -> None:
    from molehunt.report.stress_page import length_of, share_of, times_of

    rows = told["prompts"]
    typer.echo(f"{told['verdict']}  ({told['fix']})")
    typer.echo(
        f"{rows['show_it']} of {rows['given']} prompts show the behaviour, the fix flips {rows['flipped']}, {rows['attacked']} "
        f"are attacked; with no push {share_of(told['nothing'])} show it"
    )
    typer.echo(f"{'':<18}{'brought back':>20}{'length for half':>22}{'drift':>10}")
    for arm in told["arms"]:
        drift = f"{arm['drift']['pre_activation']['median']:.1g}"
        typer.echo(f"{arm['name']:<18}{share_of(arm['recovered']):>20}{length_of(arm['epsilon50']):>22}{drift:>10}")
    for name, control in told["controls"].items():
        length = "" if control["epsilon50"] is None else length_of(control["epsilon50"])
        typer.echo(f"{name:<18}{share_of(control['recovered']):>20}{length:>22}")
    for one in told["inputs"]:
        drift = f"{one['drift']['pre_activation']['median']:.1g}"
        typer.echo(f"{one['name']:<18}{share_of(one['recovered']):>20}{'':>22}{drift:>10}")
        typer.echo(f"{'  random target':<18}{share_of(one['random_target']):>20}")
    typer.echo(f"a random target takes {times_of(told['specificity_gap'])} the length")
    lower = told["lower"]
    typer.echo(
        f"lower radius, proved for the decision under noise: median {lower['median']:.2g} (no more than {lower['most']:.2g} can be proved so)"
    )
    cost = told["cost"]
    typer.echo(
        f"cost of the fix: {share_of(cost['clean_changed'])} of clean answers changed, KL {cost['kl']:.4f} nats a token"
    )
