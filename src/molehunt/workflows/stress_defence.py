"""The defence that a stress test attacks: a fix, a steering vector, or a clamp on latents of a dictionary."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.detect import load_dictionary
from molehunt.errors import UsageError, printable
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from molehunt.steer.clamp import Clamp, Mode
from molehunt.steer.fix import Fix
from molehunt.steer.vector import SteeringVector
from molehunt.stress.defences.defence import Defence, clamp_defence, fix_defence
from molehunt.transfer.saved import FittedMap
from molehunt.workflows.audit import AuditResult
from molehunt.workflows.steer import SteerResult
from molehunt.workflows.steer_fix import Operator, read_fix

AnyFix = Fix | SteeringVector | SteerResult | AuditResult | str | Path
"""A fix of an audit, a steering vector, which is subtracted, or the file of one; or a result of `audit` or `steer`."""
Select = Callable[[Site, Dictionary, int], Sequence[int]]
"""Selects latents of a dictionary by attribution, at most as many as requested."""


@dataclass(frozen=True, kw_only=True)
class DefenceRequest:
    """What the caller asks to be attacked, checked before any model is loaded."""

    fix: AnyFix | None
    dictionary: Dictionary | str | Path | None
    latents: Sequence[int] | int
    """Numbers of latents, or how many are selected by attribution."""
    mode: Mode
    value: float | int
    layer: int | None

    @property
    def selects(self) -> bool:
        """Whether latents are selected by attribution."""
        return isinstance(self.latents, int)


@dataclass(frozen=True, kw_only=True)
class OpenedDefence:
    """A defence, and what a certificate says of it."""

    defence: Defence
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list[str])


def defence_request(
    fix: AnyFix | None,
    dictionary: Dictionary | str | Path | None,
    features: str | Sequence[int] | None,
    mode: Mode,
    value: float | int,
    layer: int | None,
) -> DefenceRequest:
    """Check that exactly one of fix and dictionary is given. Raises UsageError."""
    if fix is not None and (dictionary is not None or features is not None):
        raise UsageError("--fix and --dictionary were both given: one of the two is attacked.")
    if fix is None and (dictionary is None or features is None):
        raise UsageError("Give --dictionary FOLDER with --features, or --fix FILE: one of the two is attacked.")
    latents = [] if features is None else _latents(features) if isinstance(features, str) else list(features)
    return DefenceRequest(fix=fix, dictionary=dictionary, latents=latents, mode=mode, value=value, layer=layer)


def _latents(text: str) -> list[int] | int:
    word, _, n = text.partition(":")
    if word == "best" and n.isdecimal() and int(n):
        return int(n)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UsageError(
            f"--features takes the numbers of latents, such as 12,407, or best:16; got {printable(repr(text), 60)}."
        )
    return [int(part) for part in parts]


def open_defence(request: DefenceRequest, pair: ModelPair, model_hash: str, select: Select) -> OpenedDefence:
    """Load what is attacked.

    Args:
        request: see `defence_request`.
        pair: base and fine-tune.
        model_hash: hash of the fine-tune's files; a fix for another checkpoint is refused.
        select: selects latents where the request gives only their number.

    Raises:
        UsageError: no such file, it does not fit the model, or an attack cannot enter there.
        InvalidInput: a file is broken.
    """
    if request.fix is not None:
        return _open_fix(request.fix, pair, model_hash)
    assert request.dictionary is not None
    return _open_clamp(request, request.dictionary, pair, select)


def _open_fix(fix: AnyFix, pair: ModelPair, model_hash: str) -> OpenedDefence:
    if isinstance(fix, AuditResult):
        if fix.fix is None:
            raise UsageError(f"this audit ({fix.verdict}) confirmed no fix, so there is none to attack.")
        fix = fix.fix
    sha256 = None
    if isinstance(fix, str | Path):
        path = Path(fix)
        if not path.is_file():
            raise UsageError(f"{printable(str(path))} is not a file; give fix.safetensors of an audit, or a vector.")
        found, sha256 = read_fix(path), hashlib.sha256(path.read_bytes()).hexdigest()
        if isinstance(found, FittedMap):
            raise UsageError(
                f"{printable(path.name)} is a map, and only a fix of an audit or a vector can be attacked."
            )
    elif isinstance(fix, SteerResult):
        found = _steered(fix)
    else:
        found = fix
    if isinstance(found, SteeringVector):
        found = _vector_fix(found, -1.0, "add")
    found.refuse(pair.n_layers, pair.d_model, model_hash)
    about = {"fix": found.description, "fix_sha256": sha256 or _hash_in_memory(found)}
    return OpenedDefence(defence=fix_defence(found), about=about)


def _steered(result: SteerResult) -> Fix:
    """The edit of a result of `molehunt.steer`. Raises UsageError where it does not act on every token."""
    if result.condition is not None or result.scope != "all":
        chosen = "the prompts that its gate opens for" if result.condition is not None else f"scope {result.scope!r}"
        raise UsageError(
            f"this result steers only {chosen}, and a vector is attacked where it acts on every token: give fix=result.vector, "
            "or fit it with scope='all' and without fpr."
        )
    return _vector_fix(result.vector, result.strength, result.operator)


def _vector_fix(vector: SteeringVector, strength: float | int, operator: Operator) -> Fix:
    """A fix that steers every token with a vector."""
    sites = " and ".join(map(str, vector.sites))
    facts = vector.facts
    edit = f"subtract {abs(strength):g} times" if strength < 0 else f"add {strength:g} times"
    edit = f"ablate {strength:.0%} of" if operator == "ablate" else "subtract" if strength == -1 else edit
    return Fix(
        interventions=tuple(vector.interventions(strength, operator=operator)),
        description=f"{edit} a vector ({facts.method}) at {sites}",
        d_model=facts.d_model,
        n_layers=facts.n_layers,
        model=facts.model,
    )


def _hash_in_memory(fix: Fix) -> str | None:
    """Hash of the file that the fix would be saved as; None where it cannot be saved, such as behind a gate."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return hashlib.sha256(fix.save(Path(folder) / "fix.safetensors").read_bytes()).hexdigest()
        except UsageError:
            return None


def _open_clamp(
    request: DefenceRequest, dictionary: Dictionary | str | Path, pair: ModelPair, select: Select
) -> OpenedDefence:
    found = dictionary if isinstance(dictionary, Dictionary) else load_dictionary(dictionary, d_model=pair.d_model)
    if found.d_in != pair.d_model:
        raise UsageError(f"this dictionary is for a width of {found.d_in}, and the model has {pair.d_model}.")
    site = _site(found, request.layer, pair)
    notes: list[str] = []
    if isinstance(request.latents, int):
        latents = list(select(site, found, request.latents))
        if len(latents) < request.latents:
            notes.append(
                f"{len(latents)} latents have a positive attribution to the behaviour; {request.latents} were requested"
            )
    else:
        latents = list(request.latents)
    clamp = Clamp(site, found, torch.tensor(latents), request.mode, request.value)
    weights = hashlib.sha256()
    for tensor in (found.W_enc, found.b_enc, found.W_dec, found.b_dec):
        weights.update(tensor.float().contiguous().cpu().numpy().tobytes())
    about = {
        "fix": f"{len(latents)} latent{'s' * (len(latents) > 1)} at {site}: {request.mode} {request.value:g}",
        "dictionary_sha256": weights.hexdigest(),
        "latents": latents,
        "mode": request.mode,
        "value": request.value,
    }
    return OpenedDefence(defence=clamp_defence(clamp), about=about, notes=notes)


def _site(dictionary: Dictionary, layer: int | None, pair: ModelPair) -> Site:
    """Where the dictionary's activations come from. Raises UsageError unless the model has it and an attack can enter."""
    site = dictionary.site if layer is None else Site(layer)
    release = str(dictionary.meta.get("release", ""))
    if release and not release.endswith("-res"):
        raise UsageError(
            f"this dictionary is of {printable(release)}, and an attack enters at a block's output: give one of a -res release."
        )
    if site is None:
        raise UsageError("this dictionary's files do not say where its activations come from; give --layer.")
    if dictionary.site not in (None, site):
        raise UsageError(f"this dictionary is of {dictionary.site}, and --layer says L{layer}; leave --layer away.")
    if site.layer >= pair.n_layers:
        raise UsageError(f"a dictionary of {site}, and the model has the blocks L0 to L{pair.n_layers - 1}.")
    return site
