"""Train sparse dictionaries on harvested activations, and write them for SAELens."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from molehunt.activation.manifest import MANIFEST
from molehunt.activation.shuffle import PairBatch, batches
from molehunt.activation.store import ActivationStore
from molehunt.dictionary.catalog import CATALOG
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.detect import load_dictionary
from molehunt.dictionary.formats.sae_lens import CONFIG, FILES, save_dictionary
from molehunt.dictionary.grid import grid
from molehunt.dictionary.pairing import Kind
from molehunt.dictionary.train import GROUP, DictionarySpec, TrainingConfig, train_dictionaries
from molehunt.errors import UsageError, printable, terminal_text
from molehunt.run.catalog import names
from molehunt.run.folder import RunFolder
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.run.unit import file_hash
from molehunt.site import Site
from molehunt.workflows.result import summary_html

BUFFER_TOKENS = 2**17
"""Number of tokens that are mixed with each other on their way out of a store."""
DONE, CHECKPOINT = "dictionaries.json", "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The dictionaries of one pass over a store."""

    out: Path
    """Each lies in a folder of its own below this one, in the format of SAELens."""
    content: dict[str, Any]

    @property
    def dictionaries(self) -> dict[str, Path]:
        """Name of each dictionary → its folder."""
        return {row["name"]: self.out / row["name"] for row in self.content["dictionaries"]}

    def summary(self) -> str:
        """How well each dictionary reconstructs, how sparse it is, and where it lies."""
        rows = self.content["dictionaries"]
        lines = [
            f"TRAINED {len(rows)} on {self.content['tokens']} tokens each, {self.content['epochs']:.2g} times the store's",
            f"{'unexplained':>11} {'latents/token':>13} {'dead':>6}  folder",
        ]
        lines += [
            f"{row['reconstruction']:>11.4f} {row['l0']:>13.2f} {row['dead']:>6.1%}  {self.out / row['name']}"
            for row in rows
        ]
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """Settings and last losses of every dictionary."""
        return self.content

    def save(self, folder: Path | str) -> Path:
        """Write the table into `folder`. The dictionaries stay where they were trained."""
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_json(DONE, self.content)
        return run.write_text("summary.txt", self.summary() + "\n")

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@dataclass(frozen=True, kw_only=True)
class DictionaryChoices:
    """Lists of choices: every combination that makes sense is trained."""

    architectures: Sequence[str] = ("batch-topk",)
    """Names of the catalogue, such as `batch-topk`."""
    pairings: Sequence[Kind] = ("difference",)
    """What a dictionary reads: `difference`, `both` (a crosscoder), `tuned` or `base`."""
    joints: Sequence[float] = ()
    """Error of crosscoders: from 0, both models' errors, to -1, the difference's."""
    exclusives: Sequence[float] = ()
    """Share of a crosscoder's latents that belong to each model alone."""
    sites: Sequence[Site] | None = None
    """Where; all sites of the store by default."""
    expansions: Sequence[int] = (16,)
    """Latents per dimension of the model."""
    ks: Sequence[int] = ()
    """Number of latents that fire on a token; the target of jumprelu."""
    l1s: Sequence[float] = ()
    """Weights of the L1 penalty of relu and gated."""
    lr: float | None = None
    """Peak learning rate; by default it follows the width."""
    seeds: Sequence[int] = (0,)
    """Seeds of the initial weights."""

    def specs(self, store: ActivationStore) -> tuple[DictionarySpec, ...]:
        """One spec for each combination. Raises UsageError for a choice that does not fit the others or the store."""
        sites = store.sites if self.sites is None else tuple(self.sites)
        for site in sites:
            refuse_unharvested(site, store)
        for name in self.architectures:
            _refuse_unknown(name)
        found = grid(
            d_model=store.d_model,
            sites=sites,
            architectures=self.architectures,
            pairings=self.pairings,
            joints=self.joints,
            exclusives=self.exclusives,
            expansions=self.expansions,
            ks=self.ks,
            l1s=self.l1s,
            lr=self.lr,
            seeds=self.seeds,
        )
        if store.manifest.delta_int8 and any(spec.pairing.kind != "difference" for spec in found):
            raise UsageError("This store holds differences alone (--delta-int8); --pairing difference reads them.")
        for spec in found:
            spec.build(store.d_model)  # what cannot be built leaves no folder behind
        return tuple(found)


@checked
def train(
    store: ActivationStore | Path | str,
    *,
    out: Path | str,
    choices: DictionaryChoices | None = None,
    config: TrainingConfig | None = None,
    keep_sinks: bool = False,
    device: str = "cpu",
    data_seed: int = 0,
    track: Track = silent,
) -> TrainResult:
    """Train every combination of the given choices in one pass over a store.

    Args:
        store: a store that `harvest` made, or its folder.
        out: folder for the dictionaries; a training that was interrupted there is resumed.
        choices: which dictionaries; one BatchTopK dictionary of the difference for each site by default.
        config: number of steps, batch size and precision; 2,000 steps by default.
        keep_sinks: train on attention sinks, too.
        device: where to train.
        data_seed: seed of the order of tokens.
        track: shows progress.

    Raises:
        UsageError: a choice that does not fit the others or the store. Nothing is written then.

    Example:
        >>> from molehunt.workflows.dictionary import DictionaryChoices, train
        >>> train("store", out="dictionaries", choices=DictionaryChoices(ks=[16, 32])).dictionaries  # doctest: +SKIP
    """
    opened = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
    specs = (choices or DictionaryChoices()).specs(opened)
    settings = config or TrainingConfig(steps=2000)
    one_pass = _TrainingPass(opened, specs, settings, keep_sinks=keep_sinks, data_seed=data_seed)
    run = RunFolder.create(Path(out), one_pass.settings())
    if not one_pass.finished(run.path):
        one_pass.train(run, device, track)
    return TrainResult(out=run.path, content=json.loads((run.path / DONE).read_text()))


@dataclass(frozen=True, eq=False)
class _TrainingPass:
    """All that determines a training: the store, the dictionaries and the settings that they share."""

    store: ActivationStore
    specs: tuple[DictionarySpec, ...]
    config: TrainingConfig
    _: KW_ONLY
    keep_sinks: bool
    data_seed: int

    def settings(self) -> dict[str, Any]:
        """The config of the run's folder."""
        return {
            "command": "dictionary train",
            "specs": [spec.to_json() for spec in self.specs],
            "steps": self.config.steps,
            "batch": self.config.batch,
            "autocast": self.config.autocast,
            "keep_sinks": self.keep_sinks,
            "data_seed": self.data_seed,
            "inputs": {"store": file_hash(self.store.path / MANIFEST)},
        }

    def finished(self, folder: Path) -> bool:
        """Whether every dictionary lies below `folder`."""
        wanted = [folder / spec.name / file for spec in self.specs for file in FILES]
        return (folder / DONE).is_file() and all(path.is_file() for path in wanted)

    def train(self, run: RunFolder, device: str, track: Track) -> None:
        """Train all dictionaries, and write each into a folder of its own."""
        trained = train_dictionaries(
            self.specs,
            {site: self.batches(site) for site in dict.fromkeys(spec.site for spec in self.specs)},
            self.config,
            d_model=self.store.d_model,
            device=device,
            checkpoint=run.path / CHECKPOINT,
            track=track,
        )
        rows: list[dict[str, Any]] = []
        for one in trained:
            save_dictionary(one.dictionary, run.path / one.spec.name)
            run.write_json(f"{one.spec.name}/history.json", list(one.history))
            last = {name: one.history[-1][name] for name in ("reconstruction", "l0", "dead")}
            rows.append({"name": one.spec.name, **one.spec.to_json(), "d_dict": one.dictionary.d_dict, **last})
        tokens = self.config.steps * self.config.batch
        used = self.store.tokens if self.keep_sinks else self.store.tokens - self.store.manifest.sinks
        run.write_json(DONE, {"dictionaries": rows, "tokens": tokens, "epochs": tokens / used})
        run.write_env()

    def batches(self, site: Site) -> Callable[[int], Iterable[PairBatch]]:
        """A function from a number of batches to those that follow them."""
        return lambda skip: batches(
            self.store,
            site,
            size=self.config.batch,
            seed=self.data_seed,
            buffer_tokens=max(self.config.batch, BUFFER_TOKENS),
            drop_sinks=not self.keep_sinks,
            skip=skip,
            delta_only=self.store.manifest.delta_int8,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ExportResult:
    """A dictionary in the files of SAELens."""

    dictionary: Dictionary
    folder: Path

    @property
    def architecture(self) -> str:
        """What SAELens calls it."""
        return str(json.loads((self.folder / CONFIG).read_text())["architecture"])

    def summary(self) -> str:
        """Where it was written, and its size."""
        return terminal_text(
            f"WROTE {self.folder}: {self.architecture}, {self.dictionary.d_dict} latents over {self.dictionary.d_in} "
            "values"
        )

    def to_dict(self) -> dict[str, Any]:
        """Folder, architecture and size."""
        size = {"d_in": self.dictionary.d_in, "d_dict": self.dictionary.d_dict}
        return {"folder": str(self.folder), "architecture": self.architecture, **size}

    def save(self, folder: Path | str) -> Path:
        """Write the same files into another folder, and return the weights' file."""
        return export(self.dictionary, folder).folder / FILES[1]

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


def export(source: Dictionary | Path | str, folder: Path | str, *, k: int | None = None) -> ExportResult:
    """Write a dictionary of any known family so that SAELens loads it.

    Args:
        source: a dictionary, or its folder.
        folder: an empty or a new folder.
        k: number of latents that fire, where the files of Qwen Scope do not say it.

    Raises:
        UsageError: the folder holds something else, or SAELens has no form for the dictionary.

    Example:
        >>> from molehunt.workflows.dictionary import export
        >>> export("gemma-scope-folder", "for-sae-lens").architecture  # doctest: +SKIP
    """
    into = Path(folder)
    found = source if isinstance(source, Dictionary) else load_dictionary(source, k=k)
    if not isinstance(source, Dictionary) and into.resolve() == Path(source).resolve():
        raise UsageError("A dictionary is not written over itself. Give another DIR.")
    if into.exists() and (not into.is_dir() or {path.name for path in into.iterdir()} - set(FILES)):
        raise UsageError(f"{printable(str(into))} holds something else. Give an empty or a new DIR.")
    save_dictionary(found, into)
    return ExportResult(dictionary=found, folder=into)


def refuse_unharvested(site: Site, store: ActivationStore) -> None:
    """Raises UsageError, listing the store's sites, for a site that is not one of them."""
    if site not in store.sites:
        raise UsageError(f"{site} is not in this store, which holds {', '.join(map(str, store.sites))}.")


def _refuse_unknown(architecture: str) -> None:
    known = names(CATALOG, GROUP)
    if architecture not in known:
        close = get_close_matches(architecture, known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(
            f"There is no architecture {printable(architecture)!r}.{meant}\nAvailable: {', '.join(known)}."
        )
