"""`molehunt.fit_detector`: fit one detector, set its threshold on clean text, and apply it to other texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import Checkpoint
from molehunt.contracts import Detector
from molehunt.detect.pooling import How, Where
from molehunt.detect.readings import Readings, read_rows
from molehunt.detect.reads import Reads
from molehunt.detect.recipe import (
    DetectorRecipe,
    FitInputs,
    FitRows,
    LabelledRows,
    Need,
    NoRows,
    Readout,
    detector_recipes,
    two_thirds,
)
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import InvalidInput, UsageError, printable, terminal_text
from molehunt.measure.threshold import check_clean_rows, check_rate, conformal_threshold
from molehunt.model.pair import ModelPair
from molehunt.run.folder import RunFolder
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.run.whole import replace_whole
from molehunt.site import Site
from molehunt.traffic.example import Example
from molehunt.traffic.split import Calibrate, Fit
from molehunt.workflows.detector_file import detector_parts, models_of, rebuilt_detector, refuse_other_models
from molehunt.workflows.inputs import Texts, examples
from molehunt.workflows.models import adapter_choice
from molehunt.workflows.result import summary_html, summary_repr

FIT_SHARE = 1 / 3
"""Share of the clean rows that a detector is fitted on, where it is; the others set the threshold."""
ANSWER_TOKENS = 40
"""Greatest number of tokens of an answer that are read, where scores are read in answers."""
WEIGHT_DIRECTIONS = 8
"""Singular directions of each changed matrix that detectors along weight directions read."""
SETTINGS, TENSORS = "detector.json", "detector.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedDetector:
    """A detector with the threshold that clean text set, ready for texts of the same models."""

    pair: ModelPair
    detector: Detector
    recipe: str
    """Key of the recipe that fitted it."""
    readout: Readout
    fpr: float
    threshold: float
    """A text is flagged where its score exceeds this."""
    fit_rows: int
    """Number of clean texts that it was fitted on."""
    suspect_rows: int
    """Number of suspect texts that it was fitted on."""
    calibrate_rows: int
    """Number of other clean texts, which set the threshold."""

    def scores(self, texts: Texts, *, track: Track = silent) -> list[float]:
        """One score per text; higher is more suspicious."""
        return _scores(self.pair, examples(texts), self.detector, self.readout, track).tolist()

    def flags(self, texts: Texts, *, track: Track = silent) -> list[bool]:
        """Whether each text scores above the threshold."""
        return [score > self.threshold for score in self.scores(texts, track=track)]

    def summary(self) -> str:
        """What was fitted, where it is read, and its threshold."""
        on = [f"{n} {kind}" for n, kind in ((self.fit_rows, "clean"), (self.suspect_rows, "suspect")) if n]
        fit = f"fitted on {' and '.join(on)} texts" if on else "not fitted on text"
        further = "further " * (self.fit_rows > 0)
        return terminal_text(
            f"{self.detector.name}, read at {self.readout.where} ({self.readout.how}): {fit}; flags scores above "
            f"{self.threshold:.4g}, the threshold of {self.calibrate_rows} {further}clean texts at a false-positive rate "
            f"of {self.fpr:.2%}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings and the threshold."""
        return {
            "recipe": self.recipe,
            "detector": self.detector.name,
            "sites": [str(site) for site in self.detector.sites],
            "where": self.readout.where,
            "how": self.readout.how,
            "fpr": self.fpr,
            "threshold": self.threshold,
            "fit_rows": self.fit_rows,
            "suspect_rows": self.suspect_rows,
            "calibrate_rows": self.calibrate_rows,
        }

    def save(self, folder: Path | str) -> Path:
        """Write settings and tensors into `folder`, for `FittedDetector.load`; returns the settings' file.

        Raises:
            UsageError: the detector reads a dictionary, which has a file of its own; fit it again from that.
        """
        values, tensors = detector_parts(self.detector)
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        replace_whole(run.path / TENSORS, lambda path: save_file(tensors, path))
        return run.write_json(SETTINGS, {**self.to_dict(), **models_of(self.pair), "values": values})

    @classmethod
    def load(cls, folder: Path | str, pair: ModelPair) -> "FittedDetector":
        """A detector that `save` wrote, for the models that it was fitted on.

        Raises:
            InvalidInput: the folder holds no detector, or one of a plugin that is not installed.
            UsageError: it was fitted on other models.
        """
        path = Path(folder)
        try:
            stored: dict[str, Any] = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
            tensors = load_file(path / TENSORS)
            detector = rebuilt_detector(stored["recipe"], stored["values"], tensors)
            models = {name: stored[name] for name in ("model", "n_layers", "d_model")}
            found = cls(
                pair=pair,
                detector=detector,
                recipe=stored["recipe"],
                readout=Readout(stored["where"], stored["how"]),
                **{name: stored[name] for name in ("fpr", "threshold", "fit_rows", "suspect_rows", "calibrate_rows")},
            )
        except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
            raise InvalidInput(
                f"{printable(path.name)} holds no detector that can be read ({printable(str(error), 200)})."
            ) from error
        refuse_other_models(models, models_of(pair), path.name)
        return found

    def __repr__(self) -> str:
        return summary_repr(self)

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def fit_detector(
    pair: ModelPair,
    name: str,
    *,
    clean: Texts,
    suspect: Texts | None = None,
    traffic: Texts | None = None,
    dictionary: Dictionary | None = None,
    site: Site | None = None,
    fpr: float = 0.01,
    where: Where | None = None,
    how: How | None = None,
    seed: int = 0,
    track: Track = silent,
) -> FittedDetector:
    """Fit a detector of the catalogue or of a plugin, and set its threshold on clean text.

    A third of the clean texts is for fitting, and the others, which fit nothing, set the threshold.

    Args:
        pair: base and fine-tune.
        name: name of the detector, such as `mean-difference`, `delta-mahalanobis` or `token-kl`; a wrong name lists them all.
        clean: texts without the behaviour, as the traffic to come will be; about 1.5/fpr or more are needed, as a third of
            them fits the detector.
        suspect: texts with the behaviour, for detectors that learn from labels.
        traffic: unlabelled texts, for detectors that look for rare rows among them.
        dictionary: for detectors that read the latents of one.
        site: where activations are read; by default two thirds into the model.
        fpr: share of clean texts that may be flagged.
        where: the last token of the prompt (`decision`, where the detector can be read there), `generated` or `all`.
        how: how the scores of several tokens become one: by default as the benchmark does first.
        seed: seed of the split and of everything random.
        track: shows progress.

    Raises:
        UsageError: `pair` is no loaded pair, there is no such detector, or something that it needs was not given.
        NotTestable: too few clean texts for `fpr`.

    Example:
        >>> import molehunt as mh
        >>> pair = mh.ModelPair.load("BASE", "TUNED")  # doctest: +SKIP
        >>> found = mh.fit_detector(pair, "mean-difference", clean="clean.jsonl", suspect="bad.jsonl")  # doctest: +SKIP
        >>> found.flags(["What is 2 plus 2?"])  # doctest: +SKIP
    """
    if not isinstance(pair, ModelPair):  # pyright: ignore[reportUnnecessaryIsInstance]  # a notebook has no type checker
        raise UsageError("fit_detector takes a loaded pair first: give ModelPair.load(base, tuned).")
    check_rate(fpr)
    recipe = _recipe(name)
    readout = _readout(recipe, where, how)
    rows, share = examples(clean), FIT_SHARE if _fits_on_text(recipe) else 0
    check_clean_rows(len(rows), lambda n: n - round(n * share), fpr)  # before a model runs
    fit, calibrate = _split(rows, recipe, seed)
    at = site or (dictionary.site if dictionary is not None else None) or _middle(pair)
    fitting = _Fitting(pair=pair, recipe=recipe, site=at, readout=readout, fit=fit, track=track)
    suspects = None if suspect is None else examples(suspect)
    detector, used = fitting.detector(suspects, traffic, dictionary, seed)
    return FittedDetector(
        pair=pair,
        detector=detector,
        recipe=recipe.key,
        readout=readout,
        fpr=fpr,
        threshold=conformal_threshold(_scores(pair, list(calibrate.rows), detector, readout, track), fpr),
        fit_rows=len(fit),
        suspect_rows=len(suspects) if used and suspects is not None else 0,
        calibrate_rows=len(calibrate),
    )


@dataclass(eq=False)
class _RecordedRows:
    """Rows that remember whether a detector looked at them: some recipes take no labels into account."""

    rows: FitRows
    used: bool = False

    def acts(self, site: Site, reads: Reads, where: Where) -> Tensor:
        self.used = True
        return self.rows.acts(site, reads, where)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fitting:
    """A recipe, and the clean rows, site and position that it is fitted at."""

    pair: ModelPair
    recipe: DetectorRecipe
    site: Site
    readout: Readout
    fit: Fit[Example]
    track: Track

    def detector(
        self, suspect: list[Example] | None, traffic: Texts | None, dictionary: Dictionary | None, seed: int
    ) -> tuple[Detector, bool]:
        """The fitted detector, and whether it looked at suspect texts. Raises UsageError where something that it needs was not
        given.
        """
        recipe = self.recipe
        if not recipe.needs and (suspect is not None or traffic is not None):
            raise UsageError(f"{recipe.key} is not fitted on texts; leave suspect and traffic out.")
        rows = (
            None if suspect is None else _RecordedRows(self._read([*self.fit.rows, *suspect], "reading labelled texts"))
        )
        flags = torch.arange(len(self.fit) + len(suspect or ())) >= len(self.fit)
        labelled = None if rows is None else LabelledRows(rows, flags)
        inputs = FitInputs(
            clean=self._read(self.fit.rows, "reading clean texts") if "clean" in recipe.needs else NoRows(),
            traffic=None if traffic is None else self._read(examples(traffic), "reading traffic"),
            labelled=labelled,
            select=labelled,
            dictionaries={} if dictionary is None or recipe.dictionary is None else {recipe.dictionary: dictionary},
            weights=_weight_directions(self.pair, self.site, self.track) if "weights" in recipe.needs else {},
            seed=seed,
        )
        _refuse_missing(recipe, inputs, self.site)
        found = recipe.fitted(inputs, self.site, self.readout.fitted_at)
        if found is None:
            raise UsageError(f"{recipe.key} chooses among latents: give suspect or traffic texts, too.")
        return found, rows is not None and rows.used

    def _read(self, rows: Sequence[Example], what: str) -> Readings:
        return _read(self.pair, list(rows), (self.site,), self.readout.fitted_at, (), self.track, what)


def _recipe(name: str) -> DetectorRecipe:
    known = {recipe.key: recipe for recipe in detector_recipes()}
    if name not in known:
        raise UsageError(f"There is no detector {printable(name)!r}.\nAvailable: {', '.join(sorted(known))}.")
    return known[name]


def _readout(recipe: DetectorRecipe, where: Where | None, how: How | None) -> Readout:
    """Where scores are read, and the pooling that the benchmark tries first there."""
    offered: dict[Where, How] = {readout.where: readout.how for readout in reversed((*recipe.bench, *recipe.audit))}
    chosen: Where = where or ("decision" if "decision" in offered else next(iter(offered)))
    if chosen not in offered:
        raise UsageError(f"{recipe.key} is read at {' or '.join(sorted(offered))}, not at {printable(chosen)}.")
    return Readout(chosen, how or offered[chosen])


def _middle(pair: ModelPair) -> Site:
    return two_thirds([Site(layer) for layer in range(pair.n_layers)])


def _split(clean: list[Example], recipe: DetectorRecipe, seed: int) -> tuple[Fit[Example], Calibrate[Example]]:
    """Clean rows to fit on, and others that set the threshold."""
    if not _fits_on_text(recipe):
        return Fit(()), Calibrate(tuple(clean))
    order = Random(seed).sample(clean, len(clean))
    cut = round(len(order) * FIT_SHARE)
    return Fit(tuple(order[:cut])), Calibrate(tuple(order[cut:]))


def _fits_on_text(recipe: DetectorRecipe) -> bool:
    return bool(recipe.needs & {"clean", "labels"})


def _weight_directions(pair: ModelPair, site: Site, track: Track) -> dict[Site, Tensor]:
    """Singular directions of the weight difference that are written to `site`."""
    if pair.folders is None:
        raise UsageError(
            "weight directions are read from files, and this pair was made from models in memory: save both with "
            "save_pretrained, and load them with ModelPair.load(base, tuned)."
        )
    base, tuned = pair.folders
    opened = Checkpoint.open(tuned, adapter=adapter_choice(pair.adapter))
    compared = compare_weights(Checkpoint.open(base), opened, k=WEIGHT_DIRECTIONS, track=track)
    found = [direction.vector for direction in compared.directions_at(site)]
    return {site: torch.stack(found)} if found else {}


def _refuse_missing(recipe: DetectorRecipe, inputs: FitInputs, site: Site) -> None:
    """Raises UsageError, naming the argument, where something that the recipe needs was not given."""
    asks: dict[Need, str] = {
        "labels": "give suspect texts: it learns from labels",
        "traffic": "give traffic: it looks for rare rows in unlabelled texts",
        "dictionary": "give a dictionary of this site",
        "weights": f"no changed weight matrix writes to {site}; give another site",
    }
    missing: list[Need] = [need for need in sorted(recipe.needs) if not inputs.has(need, site, recipe.dictionary)]
    if missing:
        raise UsageError(f"{recipe.key} cannot be fitted: {'; '.join(asks.get(need, need) for need in missing)}.")


def _read(
    pair: ModelPair,
    rows: list[Example],
    sites: tuple[Site, ...],
    where: Where,
    detectors: tuple[Detector, ...],
    track: Track,
    what: str,
) -> Readings:
    """Both models over prompts; over the tuned model's answers, too, unless only the decision position is read."""
    tokens = 0 if where in ("decision", "prompt") else ANSWER_TOKENS
    return read_rows(pair, rows, sites=sites, max_new_tokens=tokens, detectors=detectors, track=track, what=what)


def _scores(pair: ModelPair, rows: list[Example], detector: Detector, readout: Readout, track: Track) -> Tensor:
    logits = (detector,) if detector.needs_logits else ()
    sites = detector.sites or (() if logits else (_middle(pair),))
    readings = _read(pair, rows, sites, readout.where, logits, track, f"scoring with {detector.name}")
    return readings.pooled(detector, readout.where, readout.how)
