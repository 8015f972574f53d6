"""A checkpoint's tensors as the parameters that transformers makes of them.

A tensor's name on disk is not what a model calls it: transformers renames prefixes, fuses and splits the matrices of
experts, ties embeddings, ignores what it does not know and fills what is missing with random numbers. The same tables and
operations are applied here to names and shapes alone, on a model without weights, and to one tensor at a time when it is
read. So two folders that store one model in two ways are equal here, and a tensor that is not loaded is known by name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import NO_TEXT, textless
from molehunt.checkpoint.quantised import PLAIN
from molehunt.checkpoint.reader import Checkpoint
from molehunt.checkpoint.skeleton import ANOTHER_WAY, UnknownArchitecture, skeleton
from molehunt.errors import InvalidInput, NotTestable, printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, slots=True)
class ParameterGroup:
    """Stored tensors that transformers turns into parameters together, such as all experts' matrices of one layer."""

    sources: tuple[str, ...]
    """Names of the stored tensors, in the order in which they are joined."""
    targets: tuple[str, ...]
    """Names of the parameters that are made of them."""
    patterns: tuple[str, ...]
    """The conversion's source pattern of each stored tensor; its own name where it is only renamed."""
    transform: Any
    """transformers' own conversion, without tensors: a WeightRenaming or a WeightConverter."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each parameter, as it follows from the stored shapes."""

    @property
    def renamed(self) -> bool:
        """Whether one stored tensor is one parameter, with the same values."""
        return len(self.sources) == 1 and not hasattr(self.transform, "operations")


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedView:
    """The parameters that transformers makes of a model folder. Make it with `LoadedView.of`."""

    checkpoint: Checkpoint
    model: "PreTrainedModel"
    """The architecture on the meta device."""
    groups: tuple[ParameterGroup, ...]
    missing: tuple[str, ...]
    """Parameters that no stored tensor fills; loaders give them random values. Tied ones are not among them."""
    unexpected: tuple[str, ...]
    """Stored tensors that no parameter takes; loaders ignore them."""
    doubled: Mapping[str, tuple[str, ...]]
    """Parameter → stored tensors that all claim it, where only the first one is loaded."""
    tied: Mapping[str, str]
    """Parameter → the parameter whose tensor it shares."""
    apart: tuple[tuple[str, str], ...]
    """Pairs of parameters that the config ties and that are stored both: transformers ties them only if they are equal."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "LoadedView":
        """Apply transformers' conversion tables to the names and shapes of a model folder.

        Raises:
            NotTestable: the architecture is not a language model that transformers knows.
            InvalidInput: the config is broken, or a conversion does not fit the stored shapes.
        """
        model = skeleton(checkpoint.path)
        groups, doubled, unexpected = _grouped(checkpoint, model)
        expected = cast("dict[str, Tensor]", model.state_dict())
        made = {target for group in groups for target in group.targets}
        tied = _tied(model, made)
        lacking = [name for name in expected if name not in made and name not in tied]
        missing = tuple(sorted(name for name in lacking if not _ignored(name, model, "missing")))
        _refuse_textless(checkpoint, model, made, missing)
        return cls(
            checkpoint=checkpoint,
            model=model,
            groups=groups,
            missing=missing,
            unexpected=unexpected,
            doubled=doubled,
            tied=tied,
            apart=tuple((name, source) for name, source in _tie_keys(model).items() if {name, source} <= made),
        )

    @cached_property
    def _by_target(self) -> dict[str, ParameterGroup]:
        return {target: group for group in self.groups for target in group.targets}

    @cached_property
    def _expected(self) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", self.model.state_dict())

    def names(self) -> tuple[str, ...]:
        """Sorted names of the parameters that stored tensors fill."""
        return tuple(sorted(self._by_target))

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the stored tensors that parameter `name` is made of."""
        return self._by_target[name].sources

    def group(self, name: str) -> ParameterGroup:
        """The group that parameter `name` is made in."""
        return self._by_target[name]

    @property
    def unread(self) -> tuple[str, ...]:
        """Stored tensors whose values no parameter takes: those that loaders ignore, and copies that lose."""
        return (*self.unexpected, *(copy for copies in self.doubled.values() for copy in copies[1:]))

    def must_be_complete(self) -> None:
        """Make sure that loaders would fill no parameter with random numbers, and that shapes are those of the config.

        Raises:
            InvalidInput: with names, if that is not so.
            NotTestable: parameters are stored quantised, in a layout that is not known here.
        """
        quantisation = self.checkpoint.quantisation
        if self.missing and quantisation is not None and not quantisation.settings.named_parts:
            raise NotTestable(
                f"{printable(model_name(self.checkpoint.path))} stores no {printable(next(iter(self.missing)))}, and is quantised by "
                f"{printable(quantisation.method, 40)}, whose layout is not read here.\nCompare the unquantised release."
            )
        if self.missing:
            stored = f"; it holds {printable(self._instead())} instead" if self.unexpected else ""
            if quantisation is None and self._instead().endswith((".qweight", ".weight_packed", "_blocks")):
                stored += ", which loaders do not unpack without a quantization_config"
            more = f" and lacks {len(self.missing) - 1} parameters more" if len(self.missing) > 1 else ""
            raise InvalidInput(
                f"{printable(model_name(self.checkpoint.path))} has no {printable(next(iter(self.missing)))}{more}{stored}: loaders fill {'them' if more else 'it'} "
                "with random numbers.\nGet a complete copy of the model, saved by save_pretrained under its own names."
            )
        for name in self.names():
            if not self._plain(name):
                continue  # packed weights have shapes of their own
            expected = tuple(self._expected[name].shape)
            if name in self._expected and self.shape(name) != expected:
                raise InvalidInput(
                    f"{printable(model_name(self.checkpoint.path))} stores {printable(name)} as {list(self.shape(name))}, and its "
                    f"config.json asks for {list(expected)}: loaders refuse it.\nGet the config that belongs to these weights."
                )

    def _instead(self) -> str:
        """The stored tensor without a parameter that is called most like the first missing parameter, if there is one."""
        module = next(iter(self.missing)).rpartition(".")[0]
        return next((n for n in (*self.unexpected, "") if n.startswith(f"{module}.")), "".join(self.unexpected[:1]))

    def _plain(self, name: str) -> bool:
        """Whether a parameter is made of tensors that have its shape: none of them is packed, or is of a format of few bits."""
        if self.checkpoint.quantisation is None:
            return True
        sources = self.sources(name)
        return not any(one in self.checkpoint.packed or self.checkpoint.dtype(one) not in PLAIN for one in sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, as it follows from the stored tensors."""
        group = self._by_target[name]
        return group.shapes[group.targets.index(name)]

    def dtype(self, name: str) -> torch.dtype:
        """Data type in which the values of a parameter are stored."""
        return self.checkpoint.dtype(self.sources(name)[0])

    def rounding(self, name: str) -> float:
        """The largest `Checkpoint.rounding` of the stored tensors that a parameter is made of."""
        return max(self.checkpoint.rounding(one) for one in self.sources(name))

    def tensor(self, name: str, read: Callable[[str], Tensor] | None = None) -> Tensor:
        """The values of a parameter, made now from the stored tensors and not cached.

        Args:
            name: one of `names()`.
            read: gives a stored tensor by name; by default the checkpoint's own reading, dequantised.

        Raises:
            InvalidInput: NaN or infinity, or stored tensors that the conversion cannot join.
            NotTestable: a stored tensor is quantised in a way that cannot be undone exactly.
        """
        return self.realized(self._by_target[name], read)[name]

    def realized(self, group: ParameterGroup, read: Callable[[str], Tensor] | None = None) -> dict[str, Tensor]:
        """The values of all parameters of a group (see `tensor`)."""
        return _realized(group, self.model, read or self.checkpoint.tensor)


def _realized(group: ParameterGroup, model: "PreTrainedModel", read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    if not hasattr(group.transform, "operations"):
        return {group.targets[0]: read(next(iter(group.sources)))}
    transform = deepcopy(group.transform)
    for source, pattern in zip(group.sources, group.patterns, strict=True):
        transform.add_tensor(group.targets[0], source, pattern, lambda source=source: read(source))
    try:
        made = transform.convert(group.targets[0], model=model, config=model.config)
    except (InvalidInput, NotTestable):
        raise
    except Exception as error:  # shapes of a stranger's file
        shown = printable(", ".join(group.sources[:3]), 200)
        raise InvalidInput(
            f"transformers cannot make {printable(group.targets[0])} of {len(group.sources)} stored tensors ({shown}, …): "
            f"{type(error).__name__}: {printable(str(error), 200)}"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _grouped(
    checkpoint: Checkpoint, model: "PreTrainedModel"
) -> tuple[tuple[ParameterGroup, ...], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Groups, parameters that several stored tensors claim, and stored tensors without a parameter.

    The loop is the first half of transformers' `convert_and_load_state_dict_in_model`, with its own functions.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping: list[Any] = list(get_model_conversion_mapping(model))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = cast("dict[str, Tensor]", model.state_dict())
    prefix = model.base_model_prefix
    collected: dict[str, list[tuple[str, str]]] = {}
    transforms: dict[str, Any] = {}
    unexpected: list[str] = []
    for stored in sorted(checkpoint.names(), key=dot_natural_key):
        target, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
        if target not in expected and stored in expected:
            target, pattern = rename_source_key(stored, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if target not in expected:
            unexpected.append(stored)
            continue
        if target not in transforms:
            transforms[target] = by_pattern[pattern] if pattern is not None else WeightRenaming(stored, target)
        collected.setdefault(target, []).append((stored, pattern or stored))
    return *_joined(checkpoint, model, collected, transforms), tuple(unexpected)


def _joined(
    checkpoint: Checkpoint,
    model: "PreTrainedModel",
    collected: Mapping[str, Sequence[tuple[str, str]]],
    transforms: Mapping[str, Any],
) -> tuple[tuple[ParameterGroup, ...], dict[str, tuple[str, ...]]]:
    """The groups, with the shapes that follow from the stored ones, and the parameters that several tensors claim."""
    groups: list[ParameterGroup] = []
    doubled: dict[str, tuple[str, ...]] = {}
    for first, parts in collected.items():
        transform = transforms[first]
        sources, patterns = tuple(name for name, _ in parts), tuple(pattern for _, pattern in parts)
        if not hasattr(transform, "operations"):
            if len(sources) > 1:
                doubled[first] = sources
            stored = checkpoint.shape(next(iter(sources)))
            groups.append(ParameterGroup(sources[:1], (first,), patterns[:1], transform, (stored,)))
            continue
        group = ParameterGroup(sources, (first,), patterns, transform, ())
        made = _realized(group, model, lambda name: torch.empty(checkpoint.shape(name), device="meta"))
        shapes = tuple(tuple(value.shape) for value in made.values())
        groups.append(ParameterGroup(sources, tuple(made), patterns, transform, shapes))
    return tuple(groups), doubled


def loaded_views(base: Checkpoint, tuned: Checkpoint) -> tuple[LoadedView, LoadedView] | None:
    """Both folders as loaders take them; None if transformers does not know the architecture of one of them.

    Raises:
        NotTestable: the architecture is no decoder.
        InvalidInput: a config is broken, or an index lists tensors that no shard of an unknown architecture holds.
    """
    try:
        return LoadedView.of(base), LoadedView.of(tuned)
    except UnknownArchitecture:
        for side in (base, tuned):
            side.layout.refuse_unheld()
        return None


def _refuse_textless(checkpoint: Checkpoint, model: "PreTrainedModel", made: set[str], missing: Sequence[str]) -> None:
    """Raise NotTestable for a model that was saved with an output that is no text, and without the one that gives text."""
    output = cast("Any", model).get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is output and output is not None}
    heads = {f"{name}.weight" for name in heads}
    said = textless(checkpoint.config, checkpoint.names())
    if said and not heads & made and (NO_TEXT.search(said) or heads & set(missing)):
        raise NotTestable(
            f"{printable(model_name(checkpoint.path))} gives no text ({printable(said, 60)}): its output is scores or vectors, and it "
            "has no matrix that makes words. Molehunt reads models that continue a text.\nIts own outputs would have to be "
            f"compared. {ANOTHER_WAY}"
        )


def _ignored(name: str, model: "PreTrainedModel", what: str) -> bool:
    """Whether transformers expects a parameter to be missing, as the model's class says."""
    patterns = cast("list[str]", getattr(model, f"_keys_to_ignore_on_load_{what}", None) or [])
    return any(re.search(pattern, name) for pattern in patterns)


def _tied(model: "PreTrainedModel", made: set[str]) -> dict[str, str]:
    """Parameter that no stored tensor fills → the filled parameter that it shares its tensor with.

    Two parameters that the config ties and that are both stored are not tied by transformers unless they are equal.
    """
    groups: dict[str, list[str]] = {}
    for name, source in _tie_keys(model).items():
        groups.setdefault(source, [source]).append(name)
    return {
        name: next(one for one in members if one in made)
        for members in groups.values()
        if any(one in made for one in members)
        for name in members
        if name not in made
    }


def _tie_keys(model: "PreTrainedModel") -> dict[str, str]:
    """Parameter → the one that the config ties it to."""
    return cast("dict[str, str]", cast("Any", model).get_expanded_tied_weights_keys(all_submodels=True) or {})
