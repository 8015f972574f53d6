"""A saved map of any kind, refused for models that it was not fitted to."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from molehunt.errors import UsageError, printable
from molehunt.model.blocks import d_model_of
from molehunt.site import Site
from molehunt.transfer import linear_map, random_features
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.map_file import SavedMap, read_map
from molehunt.transfer.random_features import RandomFeatureMap
from molehunt.transfer.trained import TrainedMap

FittedMap = LinearMap | RandomFeatureMap | TrainedMap


@dataclass(frozen=True, kw_only=True)
class MapEnd:
    """The model that a map starts from or leads to. A hash that is None is not compared."""

    site: Site
    d_model: int
    checkpoint: str | None = None
    tokenizer: str | None = None

    @classmethod
    def of(
        cls, model: nn.Module, site: Site, *, checkpoint: str | None = None, tokenizer: str | None = None
    ) -> "MapEnd":
        """A site of a causal language model, in a PEFT wrapper or not."""
        return cls(site=site, d_model=d_model_of(model), checkpoint=checkpoint, tokenizer=tokenizer)


def load_map(path: Path, *, source: MapEnd | None = None, target: MapEnd | None = None) -> FittedMap:
    """Read a map of any kind that its `save` wrote.

    Args:
        path: the file.
        source: the model whose activations it is to map.
        target: the model that is to be given the mapped activations.

    Raises:
        InvalidInput: it is no such file.
        UsageError: the map is of another site, width, checkpoint or tokenizer.
    """
    map = read_map(path, _of_saved)
    refuse_map(map, path.name, source=source, target=target)
    return map


def refuse_map(map: FittedMap, name: str, *, source: MapEnd | None = None, target: MapEnd | None = None) -> None:
    """Raises UsageError where a map is of another site, width, checkpoint or tokenizer than the models that are given.

    Args:
        map: any map.
        name: what error messages call it, such as its file's name.
        source: the model whose activations it is to map.
        target: the model that is to be given the mapped activations.
    """
    models = map.facts.models
    for which, end, site, width, checkpoint, tokenizer in (
        ("source", source, map.source, map.widths[0], models.source, models.source_tokenizer),
        ("target", target, map.target, map.widths[1], models.target, models.target_tokenizer),
    ):
        if end is not None:
            _refuse(f"{printable(name)}: the {which}", end, site, width, checkpoint, tokenizer)


def _of_saved(saved: SavedMap) -> FittedMap:
    closed = {linear_map.KIND: LinearMap.of_saved, random_features.KIND: RandomFeatureMap.of_saved}
    return closed.get(saved.kind, TrainedMap.of_saved)(saved)


def _refuse(where: str, end: MapEnd, site: Site, width: int, checkpoint: str | None, tokenizer: str | None) -> None:
    if end.d_model != width:
        raise UsageError(
            f"{where} of this map has {width} dimensions, this model {end.d_model}: it was fitted to another model.\n"
            "Give that one, or fit a map to this one."
        )
    if end.site != site:
        raise UsageError(
            f"{where} of this map is {site}, not {end.site}: activations of other layers are other spaces.\n"
            f"Use it at {site}, or fit one for {end.site}."
        )
    for what, mine, given in (("checkpoint", checkpoint, end.checkpoint), ("tokenizer", tokenizer, end.tokenizer)):
        if mine is not None and given is not None and mine != given:
            raise UsageError(
                f"{where} of this map was another {what} ({printable(mine, 13)} instead of {printable(given, 13)}).\n"
                "Fit a map to this one."
            )
