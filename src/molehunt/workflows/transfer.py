"""The verb `transfer`: fit a map between two models' activations, and carry a steering vector through it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from molehunt.errors import InvalidInput, NotTestable, UsageError, printable, terminal_text
from molehunt.measure.interval import Interval
from molehunt.model.blocks import decoder_blocks
from molehunt.model.context import ContextLength, context_of, fitted, note_cuts
from molehunt.model.pair import ModelPair
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.site import Site
from molehunt.steer.vector import SteeringVector
from molehunt.traffic.chat import rendered
from molehunt.traffic.world import benign_prompts
from molehunt.transfer.alignment import Aligned, align
from molehunt.transfer.fidelity import Forced
from molehunt.transfer.fit import RIDGE, FittedTransfer, fit_transfer
from molehunt.transfer.layer_grid import LayerGrid, LayerPair
from molehunt.transfer.mapped_vector import linear_part, mapped_vector
from molehunt.transfer.method import map_method
from molehunt.transfer.saved import FittedMap, load_map
from molehunt.transfer.statistics import GridMoments
from molehunt.workflows.inputs import Texts, examples
from molehunt.workflows.result import summary_html
from molehunt.workflows.transfer_models import OpenedModel, hashes_of, opened_model

MAP, MOMENTS, NUMBERS, VECTOR = "map.safetensors", "moments.safetensors", "transfer.json", "vector.safetensors"
LEAST_TEXTS = 20
"""Fewer texts are not split into four parts."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TransferResult:
    """A fitted map, how faithful it is beside its controls, and the vector that it carried."""

    fitted: FittedTransfer
    target_layers: int
    """Number of decoder blocks of the target."""
    coverage: float
    """Share of the target's tokens that the source has a partner for."""
    vector: SteeringVector | None = None
    """The target's vector, where one of the source's was given."""

    @property
    def map(self) -> FittedMap:
        """The map, from activations of the source to activations of the target."""
        return self.fitted.map

    def carry(self, vector: SteeringVector | str | Path) -> SteeringVector:
        """Make a vector of the target out of one of the source's; see `carry`."""
        return _carried(vector, self.map, self.fitted.moments, self.target_layers)

    def summary(self) -> str:
        """The grid of all pairs of blocks, and how faithful the chosen map is beside its controls."""
        lines = [
            _grid_text(self.fitted.grid),
            f"\n{self._chosen()}",
            f"\n{'on other texts, in the target':<32}{'KL, nats a token':>24}{'CE recovered':>24}{'same next token':>24}",
        ]
        for name, one in self.fitted.fidelity.items():
            cells = (one.kl_per_token(), one.ce_recovered(), one.agreement())
            lines.append(f"{name:<32}" + "".join(f"{cell.fixed():>24}" for cell in cells))
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        map = self.map
        return {
            "source": str(map.source),
            "target": str(map.target),
            "target_layers": self.target_layers,
            "method": map.facts.method,
            "tokens": self.fitted.moments.count,
            "coverage": self.coverage,
            "fvu": self.fitted.fvu,
            "grid": [_grid_row(pair) for pair in self.fitted.grid.pairs],
            "fidelity": {name: _fidelity_row(one) for name, one in self.fitted.fidelity.items()},
        }

    def save(self, folder: Path | str) -> Path:
        """Write the map, its moments, `transfer.json` and the carried vector into `folder`, and return the map's file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.map.save(folder / MAP)
        self.fitted.moments.save(folder / MOMENTS)
        write_whole(folder / NUMBERS, json.dumps(self.to_dict(), indent=2))
        if self.vector is not None:
            self.vector.save(folder / VECTOR)
        return folder / MAP

    def _chosen(self) -> str:
        map, tokens = self.map, self.fitted.moments.count
        return (
            f"{map.source} to {map.target}: {map.facts.method}, {tokens:,} aligned tokens ({self.coverage:.0%} of the "
            f"target's), held-out FVU {self.fitted.fvu:.3f}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._chosen()})"

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def transfer(
    source: ModelPair | str | Path,
    target: ModelPair | str | Path,
    *,
    texts: Texts | None = None,
    from_layer: int | None = None,
    to_layer: int | None = None,
    map: str = RIDGE,
    vector: SteeringVector | str | Path | None = None,
    out: str | Path | None = None,
    confirm: int = 3,
    source_base: str | Path | None = None,
    target_base: str | Path | None = None,
    limit: int = 3000,
    device: str = "cpu",
    seed: int = 0,
    track: Track = silent,
) -> TransferResult:
    """Fit maps between all pairs of blocks in one pass over text, and keep the one that serves the target best.

    The grid ranks pairs by held-out variance unexplained. The best few replace the target's own activations on other
    texts, and the one that keeps most of its loss is kept.

    Args:
        source: the model that has a vector: a folder or hub id, or a loaded pair, whose fine-tune is meant.
        target: the model that is to get it, in the same forms.
        texts: rows that both models read: prompts, with answers where there are some; bundled prompts by default.
        from_layer: 0-based block of the source; by default that of `vector`, or chosen by the grid.
        to_layer: 0-based block of the target; chosen by the grid by default.
        map: name of the method, a row of `transfer/catalog.py` or of a plugin.
        vector: a steering vector of the source, or its file, to carry over.
        out: folder that the result is saved to.
        confirm: number of pairs of the grid that are tried in the target.
        source_base: base of a source that is an adapter.
        target_base: base of a target that is an adapter.
        limit: greatest number of rows that are read.
        device: where the models run.
        seed: seed of the split of the texts.
        track: shows progress.

    Raises:
        UsageError: there is no such map or block, or an adapter's base is missing.
        NotTestable: too few texts or too few tokens.

    Example:
        >>> import molehunt as mh
        >>> result = mh.transfer("SOURCE", "TARGET", texts="rows.jsonl", from_layer=3)  # doctest: +SKIP
        >>> theirs = result.carry("vector.safetensors")  # doctest: +SKIP
    """
    map_method(map)  # an unknown name is refused before a model is loaded
    own = SteeringVector.load(Path(vector)) if isinstance(vector, str | Path) else vector
    if from_layer is None and own is not None and len(own.vectors) == 1:
        from_layer = next(iter(own.vectors))
    with (
        opened_model(source, source_base, device, track) as a,
        opened_model(target, target_base, device, track) as b,
    ):
        rows = _aligned(a, b, texts, limit, seed)
        sources, targets = _sites(a, from_layer, "from"), _sites(b, to_layer, "to")
        fitted = fit_transfer(
            a.model,
            b.model,
            rows,
            sources=sources,
            targets=targets,
            name=map,
            confirm=confirm,
            models=hashes_of(a, b),
            track=track,
        )
        blocks = len(decoder_blocks(b.model))
    coverage = sum(len(row.pairs) for row in rows) / sum(len(row.target) for row in rows)
    result = TransferResult(fitted=fitted, target_layers=blocks, coverage=coverage)
    if own is not None:
        result = replace(result, vector=result.carry(own))
    if out is not None:
        result.save(out)
    return result


def carry(folder: str | Path, vector: SteeringVector | str | Path) -> SteeringVector:
    """Make a steering vector of the target out of one of the source's, through a map that was saved.

    The map's constant plays no part, and the length is what the target's own activations give it: try the vector there.

    Args:
        folder: where a `TransferResult` was saved.
        vector: the source's vector or its file.

    Raises:
        InvalidInput: the folder holds no map.
        UsageError: the vector is of another block, width or checkpoint than the map's source.

    Example:
        >>> from molehunt.workflows.transfer import carry
        >>> carry("map", "vector.safetensors").save("theirs.safetensors")  # doctest: +SKIP
    """
    folder = Path(folder)
    map = load_map(folder / MAP)
    try:
        n_layers = int(json.loads((folder / NUMBERS).read_text(encoding="utf-8"))["target_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{printable(str(folder / NUMBERS))} cannot be read: {printable(str(error))}") from None
    return _carried(vector, map, GridMoments.load(folder / MOMENTS), n_layers)


def _carried(
    vector: SteeringVector | str | Path, map: FittedMap, moments: GridMoments, n_layers: int
) -> SteeringVector:
    own = SteeringVector.load(Path(vector)) if isinstance(vector, str | Path) else vector
    linear = linear_part(map)
    return mapped_vector(own, linear, moments.pair(linear.source, linear.target), n_layers=n_layers)


def _sites(opened: OpenedModel, layer: int | None, which: str) -> list[Site]:
    blocks = len(decoder_blocks(opened.model))
    if layer is not None and not 0 <= layer < blocks:
        raise UsageError(f"--{which}-layer {layer}: that model has blocks 0 to {blocks - 1}.")
    return [Site(one) for one in (range(blocks) if layer is None else [layer])]


def _aligned(a: OpenedModel, b: OpenedModel, texts: Texts | None, limit: int, seed: int) -> list[Aligned]:
    """Texts as both models read them, in the target's chat format, shuffled."""
    rows = benign_prompts(limit, seed=seed) if texts is None else examples(texts, limit)
    if len(rows) < LEAST_TEXTS:
        raise NotTestable(
            f"{len(rows)} texts are too few to fit, choose and judge a map on; give at least {LEAST_TEXTS}."
        )
    rows = Random(seed).sample(rows, len(rows))
    shorter = min((context_of(one.model) for one in (a, b)), key=lambda context: context.tokens)
    fit = [fitted(b.tokenizer, row.asked, shorter, room=shorter.tokens // 4 * bool(row.response)) for row in rows]
    note_cuts(fit, shorter, "texts")
    whole = [rendered(b.tokenizer, one.text) + (row.response or "") for one, row in zip(fit, rows, strict=True)]
    return [_within(align(a.tokenizer, b.tokenizer, one), context_of(a.model), context_of(b.model)) for one in whole]


def _within(row: Aligned, source: ContextLength, target: ContextLength) -> Aligned:
    """The beginning of a row that both models can read."""
    pairs = tuple((i, j) for i, j in row.pairs if i < source.tokens and j < target.tokens)
    return Aligned(source=row.source[: source.tokens], target=row.target[: target.tokens], pairs=pairs)


def _grid_text(grid: LayerGrid) -> str:
    """Held-out FVU of every pair."""
    targets = sorted({pair.target for pair in grid.pairs})
    fvu = {(pair.source, pair.target): pair.fvu for pair in grid.pairs}
    lines = ["held-out FVU by pair of blocks: source down, target across"]
    lines.append(f"{'':<10}" + "".join(f"{site!s:>10}" for site in targets))
    for source in sorted({pair.source for pair in grid.pairs}):
        lines.append(f"{source!s:<10}" + "".join(f"{fvu[source, target]:>10.3f}" for target in targets))
    return "\n".join(lines)


def _grid_row(pair: LayerPair) -> dict[str, Any]:
    numbers = {"fvu": pair.fvu, "cka": pair.cka, "svcca": pair.svcca}
    return {"source": str(pair.source), "target": str(pair.target), **numbers}


def _fidelity_row(one: Forced) -> dict[str, Any]:
    intervals: dict[str, Interval] = {
        "kl": one.kl_per_token(),
        "ce_recovered": one.ce_recovered(),
        "top1": one.agreement(),
    }
    return {name: asdict(interval) for name, interval in intervals.items()}
