"""How a detector is fitted, and where its scores are read. `audit`, `bench` and `fit_detector` iterate these recipes.

Every class of `detect/catalog.py`, and every class that a plugin offers under the entry-point group `molehunt.detectors`,
has a class method `recipes()`. A recipe is fitted from `FitInputs` alone, so it sees no more than it says it needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from molehunt.contracts import Detector
from molehunt.detect.catalog import CATALOG
from molehunt.detect.pooling import How, Where
from molehunt.detect.reads import Reads
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import UsageError, printable
from molehunt.run.catalog import load, names
from molehunt.site import Site

GROUP = "molehunt.detectors"
"""Entry points of plugins that offer detectors."""
PLUGIN_ORDER = 500
"""Place of a recipe in tables where it names none: behind the methods that come with Molehunt, before their controls."""
Need = Literal["clean", "labels", "traffic", "weights", "dictionary"]
Place = Literal["finding", "two thirds"]


@runtime_checkable
class FitRows(Protocol):
    """Rows of text as both models read them."""

    def acts(self, site: Site, reads: Reads, where: Where) -> Float[Tensor, "rows d_model"]:
        """Mean activation of each row over the positions that `where` names."""
        ...


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Rows of which it is known whether they are suspect."""

    rows: FitRows
    suspect: Bool[Tensor, " rows"]


@dataclass(frozen=True, eq=False, kw_only=True)
class FitInputs:
    """Everything that a detector may look at when it is fitted."""

    clean: FitRows
    """Clean rows of the `fit` split."""
    traffic: FitRows | None = None
    """Unlabelled rows, some of them perhaps suspect."""
    labelled: LabelledRows | None = None
    """Labelled rows of the `fit` split."""
    select: LabelledRows | None = None
    """Labelled rows to choose latents on."""
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict[str, Dictionary])
    """Dictionaries by label, such as `Diff-SAE`."""
    weights: Mapping[Site, Float[Tensor, "k d_model"]] = field(default_factory=dict[Site, Tensor])
    """Singular directions of the weight difference, by the site they write to."""
    seed: int = 0

    def has(self, need: Need, site: Site, dictionary: str | None) -> bool:
        """Whether `need` can be met at `site`."""
        if need == "labels":
            return self.labelled is not None
        if need == "traffic":
            return self.traffic is not None
        if need == "weights":
            return len(self.weights.get(site, ())) > 0
        if need == "dictionary":
            found = self.dictionaries.get(dictionary or "")
            return found is not None and found.site == site
        return True


Fit: TypeAlias = Callable[[FitInputs, Site, Where], Detector | None]
"""A fitted detector at a site, from rows read at a position; None where it cannot be fitted on these rows."""


@dataclass(frozen=True, slots=True)
class Readout:
    """Where in a row a score is read, and how the scores of several tokens become one."""

    where: Where
    how: How

    @property
    def fitted_at(self) -> Where:
        """The position whose activations the detector is fitted on."""
        return "decision" if self.where in ("decision", "all") else "generated"


@dataclass(frozen=True, slots=True)
class AuditReadout(Readout):
    """One row of the audit's score table."""

    note: str = ""
    """What follows position and pooling in the table."""
    at: Place = "finding"
    """The site of the finding, or the one two thirds into the model."""
    order: int = PLUGIN_ORDER
    """Rows are sorted by it."""


EVERYWHERE = (
    Readout("decision", "max"),
    Readout("generated", "mean"),
    Readout("generated", "max"),
    Readout("all", "max"),
)
AT_DECISION = (AuditReadout("decision", "max"),)


@dataclass(frozen=True, kw_only=True)
class DetectorRecipe:
    """One way to fit one detector, with the rows that it makes in tables.

    Example:
        >>> recipe = DetectorRecipe(
        ...     key="my-score", name="my score", needs={"clean"}, fit=lambda inputs, site, where: MyScore(site)
        ... )  # doctest: +SKIP
    """

    key: str
    """What is typed, such as `mean-difference`; unique among all recipes."""
    name: str
    """What the benchmark's tables call it; unique among all recipes."""
    fit: Fit
    needs: frozenset[Need] | set[Need] = frozenset()
    """What it is fitted on; it is not fitted where something of this is missing."""
    reads: Literal["site", "logits"] = "site"
    """Activations at one site, or both models' logits. Logits are too large to store: such scores are taken while the
    models run, so they cannot be fitted."""
    dictionary: str | None = None
    """Label of the dictionary that it needs."""
    bench: tuple[Readout, ...] = EVERYWHERE
    """Rows of the benchmark."""
    audit: tuple[AuditReadout, ...] = AT_DECISION
    """Rows of an audit, which has clean rows, traffic and weight directions, and neither labels nor dictionaries."""
    order: int = PLUGIN_ORDER
    """Place in the benchmark's tables among rows that are equally good."""
    control: bool = False
    """A trivial or random baseline, not a method."""
    by_site: bool = False
    """Whether the benchmark reports its detection rate at every site."""
    directions: Callable[[Any], Float[Tensor, "k d_model"]] | None = None
    """Fitted detector → what an intervention takes out of the tuned model's activations; None where it names none."""

    def __post_init__(self) -> None:
        if self.reads == "logits" and self.needs:
            raise ValueError(f"{self.key}: a detector that reads logits is not fitted, so it needs nothing")
        stored = {("decision", "max"), ("decision", "mean"), ("generated", "mean")}
        if self.reads == "site" and any((row.where, row.how) not in stored for row in self.audit):
            raise ValueError(
                f"{self.key}: an audit stores activations of the decision position and their mean over the generated "
                "tokens; a row of its table can read nothing else"
            )

    def fitted(self, inputs: FitInputs, site: Site, where: Where) -> Detector | None:
        """The detector at a site, fitted on rows read at a position; None where something that it needs is missing."""
        if not all(inputs.has(need, site, self.dictionary) for need in self.needs):
            return None
        return self.fit(inputs, site, where)


@runtime_checkable
class RecipeSource(Protocol):
    """What a row of the catalogue, or a plugin's entry point, leads to: a detector class with recipes."""

    def recipes(self) -> tuple[DetectorRecipe, ...]: ...


def detector_recipes() -> tuple[DetectorRecipe, ...]:
    """The recipes of every detector in the catalogue and of every plugin, in the order of the benchmark's tables.

    Raises:
        UsageError: a plugin offers no recipes, or two recipes share a key or a name.
    """
    found: list[DetectorRecipe] = []
    for name in names(CATALOG, GROUP):
        source = load(CATALOG, name, GROUP)
        if not isinstance(source, RecipeSource):
            raise UsageError(
                f"The plugin {printable(name)} ({GROUP}) has no recipes.\n"
                "Give the class a class method `recipes()` that returns a tuple of DetectorRecipe, or uninstall it."
            )
        found += source.recipes()
    for label, values in (("key", [r.key for r in found]), ("name", [r.name for r in found])):
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise UsageError(f"Two detectors have the {label} {printable(repeated[0])!r}. Rename the plugin's.")
    return tuple(sorted(found, key=lambda recipe: (recipe.order, recipe.name)))


def detector_class(key: str) -> Callable[..., object]:
    """The class whose recipe has this key. Raises UsageError for a key that nobody offers."""
    for name in names(CATALOG, GROUP):
        source = load(CATALOG, name, GROUP)
        if isinstance(source, RecipeSource) and callable(source) and key in {one.key for one in source.recipes()}:
            return source
    raise UsageError(f"There is no detector {printable(key)!r}; it may come from a plugin that is not installed.")


def logit_detectors() -> tuple[Detector, ...]:
    """The detectors that score while the models run, because their logits are not stored."""
    return tuple(made for recipe in detector_recipes() if (made := unfitted(recipe)) is not None)


def unfitted(recipe: DetectorRecipe) -> Detector | None:
    """The detector of a recipe that reads logits; None for one that reads a site."""
    return recipe.fit(FitInputs(clean=NoRows()), Site(0), "decision") if recipe.reads == "logits" else None


class NoRows:
    """Stands in where a detector is fitted on nothing."""

    def acts(self, site: Site, reads: Reads, where: Where) -> Float[Tensor, "rows d_model"]:
        raise ValueError("a detector whose recipe needs no clean rows asked for activations of them")


def two_thirds(sites: tuple[Site, ...] | list[Site], among: list[Site] | None = None) -> Site:
    """The site two thirds into the model, where one must be taken without labels; of `among`, the one nearest to it."""
    wanted = 2 / 3 * (len(sites) - 1)
    return min(sites if among is None else among, key=lambda site: abs(sites.index(site) - wanted))
