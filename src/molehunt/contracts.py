"""The four things every method ends in. Nothing else in the project may care which method it was.

A new method is one new file that returns one of these, and one row in its folder's `catalog.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.site import Site


@dataclass(frozen=True, eq=False, kw_only=True)
class Reading:
    """What one teacher-forced pass of a model pair over a batch of token rows left behind.

    Positions where `mask` is False are padding: their values mean nothing and no score may depend on them.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True at real tokens."""
    decision: Int[Tensor, " batch"]
    """Index of the last prompt token of each row: the position whose output is the first generated token."""
    tuned: Mapping[Site, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict[Site, Tensor])
    base: Mapping[Site, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict[Site, Tensor])
    tuned_logits: Float[Tensor, "batch pos vocab"] | None = None
    base_logits: Float[Tensor, "batch pos vocab"] | None = None


@runtime_checkable
class Detector(Protocol):
    """Text through a model pair → one score per token; higher is more suspicious."""

    needs_logits: ClassVar[bool]
    """Whether `score` reads logits."""

    @property
    def needs_base(self) -> bool:
        """Whether `score` reads the base model's activations or logits."""
        ...

    @property
    def name(self) -> str:
        """What a report calls it, unique among the detectors of one run."""
        ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose activations `score` reads."""
        ...

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        """One score per token. A row's scores depend on that row's real tokens alone."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """An edit of the activations at one site. Strength 0 changes nothing, bit for bit."""

    @property
    def site(self) -> Site: ...

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Edited activations, same shape and dtype. Called once per forward pass, so once per cached step."""
        ...


@runtime_checkable
class Gate(Protocol):
    """Decides, token by token, whether an intervention acts."""

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """True where the intervention behind this gate is to act."""
        ...


@runtime_checkable
class TransferMap(Protocol):
    """Activations of model A at a site → activations of model B at a site."""

    @property
    def source(self) -> Site: ...

    @property
    def target(self) -> Site: ...

    def __call__(self, acts: Float[Tensor, "tokens d_source"]) -> Float[Tensor, "tokens d_target"]:
        """Mapped activations, one row per token."""
        ...
