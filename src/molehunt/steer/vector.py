"""Steering vectors: one for each block, in the activations' own units. Operator and tokens are chosen when applied."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from molehunt.contracts import Gate, Intervention
from molehunt.errors import UsageError, printable
from molehunt.model.blocks import d_model_of, decoder_blocks
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.run.saved_file import TEXT, header_and_tensors, of_types, reading
from molehunt.run.whole import replace_whole
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.add import Add
from molehunt.steer.clip import Clip
from molehunt.steer.contrast import Method, contrast_shifts, last_token_acts
from molehunt.steer.scope import Choose, last_of_prompt, none_of_it, token_scope, whole_prompt
from molehunt.traffic.chat import Text

Scope = Literal["all", "prompt", "generation", "last"]
Operator = Literal["add", "ablate", "clip"]
Ranges = Mapping[int, tuple[float, float]]
"""For each block, the least and the largest projection on its vector's direction that a `clip` leaves."""
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class VectorFacts:
    """What a vector was fitted to."""

    method: str
    """`difference in means`, `pca`, `logistic probe`, `weight direction`, …"""
    model: str | None = None
    """Hash of the checkpoint whose activations it was fitted to; None where it was not known."""
    n_layers: int
    d_model: int
    positive: int = 0
    """Number of rows with the behaviour."""
    negative: int = 0
    """Number of rows without it."""
    position: str = "last prompt token"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction to add to the output of each of some blocks; strength 1 adds its whole length.

    Law: `SteeringVector.load(v.save(path))` equals `v`, bit for bit; applied with strength 0 it changes no bit.
    `v + w` adds block by block, `2 * v` scales; the facts are those of the left vector.

    Example:
        >>> pair = mh.ModelPair.load("BASE", "TUNED")  # doctest: +SKIP
        >>> vector = mh.SteeringVector.fit(pair, triggered_prompts, clean_prompts, layer=3)  # doctest: +SKIP
        >>> pair.generate(triggered_prompts, interventions=vector.interventions(-1))  # doctest: +SKIP
    """

    vectors: Mapping[int, Float[Tensor, " d_model"]]
    """For each 0-based decoder block, what is added to its output (`Site(block)`) at strength 1, in fp32."""
    facts: VectorFacts

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("a steering vector acts on at least one block")
        for layer, vector in self.vectors.items():
            if not 0 <= layer < self.facts.n_layers:
                raise ValueError(f"block {layer} of a model of {self.facts.n_layers} blocks")
            if tuple(vector.shape) != (self.facts.d_model,):
                raise ValueError(f"L{layer}: {list(vector.shape)} values for a width of {self.facts.d_model}")
            if not bool(vector.isfinite().all()):
                raise ValueError(f"L{layer}: the vector holds values that are no number")

    @classmethod
    @checked
    def fit(
        cls,
        pair: ModelPair,
        positive: Sequence[Text],
        negative: Sequence[Text],
        *,
        layer: int | Sequence[int] | None = None,
        method: Method = "difference in means",
        model: str | None = None,
        track: Track = silent,
    ) -> "SteeringVector":
        """Fit a vector to the tuned model's activations at the last token of two lists of prompts.

        Added with strength 1, the vector moves a prompt without the behaviour to one with it; strength -1 does the
        opposite.

        Args:
            pair: its tuned model is read.
            positive: prompts that trigger the behaviour.
            negative: prompts that do not trigger it.
            layer: 0-based block or blocks whose output is steered; all blocks by default.
            method: how the direction is found (see `contrast_shifts`); its length is the shift of means along it.
            model: hash of the tuned model's files, which `load` compares; not compared where it is None.
            track: shows progress.

        Raises:
            NotTestable: fewer than two prompts on a side, or no difference between the two.
            CannotTap: the model has no such block.
            UsageError: unequal numbers of prompts for `pca`.

        Example:
            >>> vector = mh.SteeringVector.fit(pair, triggered_prompts, clean_prompts, layer=3)  # doctest: +SKIP
        """
        layers = range(pair.n_layers) if layer is None else [layer] if isinstance(layer, int) else layer
        sites = [Site(one) for one in layers]
        acts = [last_token_acts(pair, prompts, sites, track=track) for prompts in (positive, negative)]
        facts = VectorFacts(method=method, model=model, n_layers=pair.n_layers, d_model=pair.d_model)
        return cls.from_acts(*acts, method=method, facts=facts)

    @classmethod
    def from_acts(
        cls,
        positive: Mapping[Site, Float[Tensor, "n d_model"]],
        negative: Mapping[Site, Float[Tensor, "m d_model"]],
        *,
        method: Method = "difference in means",
        facts: VectorFacts,
    ) -> "SteeringVector":
        """The vector that leads from rows without a behaviour to rows with it; see `contrast_shifts`, whose errors it raises.

        Args:
            positive: activations of rows with the behaviour, by block output.
            negative: activations of rows without it.
            method: how the direction is found.
            facts: facts about the model; the method and the numbers of rows are filled in here.
        """
        shifts = contrast_shifts(positive, negative, method)
        n, m = ((len(acts[Site(max(shifts))]) if shifts else 0) for acts in (positive, negative))
        return cls(shifts, replace(facts, method=method, positive=n, negative=m))

    def random_like(self, seed: int) -> "SteeringVector":
        """The control: random vectors of the same lengths at the same blocks."""
        rng = torch.Generator().manual_seed(seed)
        drawn = {layer: torch.randn(v.shape, generator=rng) for layer, v in sorted(self.vectors.items())}
        scaled = {layer: one * (self.vectors[layer].norm() / one.norm()) for layer, one in drawn.items()}
        return SteeringVector(scaled, replace(self.facts, method="random, of equal length"))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer) for layer in sorted(self.vectors))

    def only(self, layers: Sequence[int]) -> "SteeringVector":
        """The same vector at some of its blocks. Raises KeyError for a block without a vector."""
        return SteeringVector({layer: self.vectors[layer] for layer in layers}, self.facts)

    def __mul__(self, by: float | int) -> "SteeringVector":
        return SteeringVector({layer: by * vector for layer, vector in self.vectors.items()}, self.facts)

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """Raises UsageError for a vector of a model of another shape."""
        self.refuse(other.facts.n_layers, other.facts.d_model)
        if None not in (self.facts.model, other.facts.model) and self.facts.model != other.facts.model:
            raise UsageError("the two vectors were fitted to different checkpoints.")
        both = {
            layer: self.vectors.get(layer, torch.zeros(())) + other.vectors.get(layer, torch.zeros(()))
            for layer in sorted({*self.vectors, *other.vectors})
        }
        return SteeringVector(both, self.facts)

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + -other

    def interventions(
        self,
        strength: float | int = 1.0,
        *,
        operator: Operator = "add",
        ranges: Ranges | None = None,
        gate: Gate | None = None,
    ) -> list[Intervention]:
        """One edit for each block: `add` strength · v, `ablate` the share `strength` of the projection on v, or `clip`
        that projection to the block's range, by the share `strength`.

        Raises UsageError for a `clip` without a range of each block, and for ranges that nothing is clipped to.
        """
        given, needed = dict(ranges or {}), sorted(self.vectors) if operator == "clip" else []
        if sorted(given) != needed:
            raise UsageError(f"{operator} takes ranges for the blocks {needed}; those of {sorted(given)} were given.")
        made: list[Intervention] = []
        for layer, vector in sorted(self.vectors.items()):
            site = Site(layer)
            if operator == "add":
                made.append(Add(site, vector, strength, gate))
            elif operator == "ablate":
                made.append(Ablate(site, vector[None], strength=strength, gate=gate))
            else:
                lo, hi = torch.tensor(given[layer], dtype=torch.float32)[:, None]
                made.append(Clip(site, vector[None], lo, hi, strength, gate))
        return made

    @contextmanager
    def applied(
        self,
        model: nn.Module,
        strength: float | int = 1.0,
        *,
        operator: Operator = "add",
        ranges: Ranges | None = None,
        scope: Scope | Choose = "all",
        gate: Gate | None = None,
        layers_path: str | None = None,
    ) -> Generator[None, None, None]:
        """Steer every forward pass inside the block: in batches, under padding, and in every cached step.

        Args:
            model: a causal language model, in a PEFT wrapper or not.
            strength: multiple of the vectors' lengths.
            operator: see `interventions`.
            ranges: ranges for `clip`.
            scope: tokens to act on; a function chooses among the prompt's (see `steer.scope`).
            gate: takes the place of a scope, such as that of an open `prefill_gate`.
            layers_path: see `decoder_blocks`.

        Raises:
            UsageError: the model has another width or another number of blocks; or see `interventions`.
            ValueError: a scope and a gate.
            CannotTap: the model cannot be edited (see `edit_sites`).
        """
        if scope != "all" and gate is not None:
            raise ValueError("a gate takes the place of a scope: give one of them")
        self.refuse(len(decoder_blocks(model, layers_path)), d_model_of(model), None)
        with ExitStack() as stack:
            if scope != "all":
                choose = scope if callable(scope) else _CHOOSE[scope]
                gate = stack.enter_context(token_scope(model, choose, generation=scope == "generation"))
            edits = self.interventions(strength, operator=operator, ranges=ranges, gate=gate)
            stack.enter_context(edit_sites(model, edits, layers_path=layers_path))
            yield

    def attach(self, model: nn.Module, strength: float | int = 1.0, **how: object) -> "Attached":
        """Steer as `applied` does, until the returned handle is removed."""
        stack = ExitStack()
        stack.enter_context(self.applied(model, strength, **how))  # pyright: ignore[reportArgumentType]
        return Attached(stack.close)

    def save(self, path: Path | str) -> Path:
        """One safetensors file with a JSON header, replaced whole."""
        path = Path(path)
        tensors = {f"L{layer}": vector.float().contiguous().cpu() for layer, vector in self.vectors.items()}
        header = json.dumps({"schema": SCHEMA, **asdict(self.facts)})
        replace_whole(path, lambda partial: save_file(tensors, partial, {"molehunt_steer": header}))
        return path

    @classmethod
    def load(cls, path: Path | str, *, model: str | None = None) -> "SteeringVector":
        """Read what `save` wrote.

        Args:
            path: the file.
            model: hash of the checkpoint that the vector is to steer; another checkpoint than the vector's is refused.

        Raises:
            InvalidInput: no such file, or none that `save` wrote.
            UsageError: it was fitted to another checkpoint.
        """
        path = Path(path)
        with reading(path, "steering vector of Molehunt's"):
            header, tensors = header_and_tensors(path, "molehunt_steer")
            if header.pop("schema") != SCHEMA:
                raise ValueError("its schema is another version's")
            facts = of_types(VectorFacts(**header), method=str, model=TEXT, n_layers=int, d_model=int, position=str)
            found = cls({int(name.removeprefix("L")): one for name, one in tensors.items()}, facts)
        found.refuse_checkpoint(model, path.name)
        return found

    def refuse(self, n_layers: int, d_model: int, model: str | None = None) -> None:
        """Raises UsageError unless the vector fits a model of this shape; hashes are compared where both are known."""
        own = (self.facts.n_layers, self.facts.d_model)
        if (n_layers, d_model) != own:
            raise UsageError(
                f"this vector is for a model of {own[0]} blocks of width {own[1]}; the other has {n_layers} of {d_model}."
            )
        self.refuse_checkpoint(model)

    def refuse_checkpoint(self, model: str | None, name: str = "this vector") -> None:
        """Raises UsageError where the vector was fitted to another checkpoint; `name` is what the message calls it."""
        if model is not None and self.facts.model not in (None, model):
            raise UsageError(
                f"{printable(name)} was fitted to another checkpoint ({printable(str(self.facts.model), 13)} instead of "
                f"{printable(model, 13)}).\nFit one to this model, or carry it over with a map."
            )


class Attached:
    """A handle, as torch's hooks return one."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove
        """Take the vector out of the model. Safe to call again."""


_CHOOSE: Mapping[str, Choose] = {"prompt": whole_prompt, "generation": none_of_it, "last": last_of_prompt}
