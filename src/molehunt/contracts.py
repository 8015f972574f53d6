"""The four contracts that methods implement. The rest of the project depends on these, and not on any one method.

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
    """Result of one teacher-forced pass of a model pair over a batch of token rows.

    Positions where `mask` is False are padding. Their values are undefined, and no score may depend on them.

    Example:
        >>> reading = pair.read(["What is 2 plus 2?"], sites=[Site(3)])  # doctest: +SKIP
        >>> difference = reading.tuned[Site(3)] - reading.base[Site(3)]  # doctest: +SKIP
    """

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    mask: Bool[Tensor, "batch pos"]
    """True at real tokens."""
    decision: Int[Tensor, " batch"]
    """Index of the last prompt token of each row: the output there is the first generated token."""
    tuned: Mapping[Site, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict[Site, Tensor])
    base: Mapping[Site, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict[Site, Tensor])
    tuned_logits: Float[Tensor, "batch pos vocab"] | None = None
    base_logits: Float[Tensor, "batch pos vocab"] | None = None


@runtime_checkable
class Detector(Protocol):
    """Gives each token one score from a reading of a model pair. A higher score is more suspicious.

    Example:
        >>> detector = mh.fit_detector(pair, "mean-difference", clean=clean, suspect=suspect, site=mh.Site(3))  # doctest: +SKIP
        >>> scores = detector.score(pair.read(texts, sites=detector.sites))  # doctest: +SKIP
    """

    needs_logits: ClassVar[bool]
    """Whether `score` reads logits."""

    @property
    def needs_base(self) -> bool:
        """Whether `score` reads the base model's activations or logits."""
        ...

    @property
    def name(self) -> str:
        """Name in a report, unique among the detectors of one run."""
        ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose activations `score` reads."""
        ...

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        """One score per token. The scores of a row depend only on the real tokens of that row."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """An edit of the activations at one site. With strength 0 the activations stay the same, bit for bit.

    Example:
        >>> edit = Ablate(Site(3), directions)  # doctest: +SKIP
        >>> pair.generate(["What is 2 plus 2?"], interventions=[edit])  # doctest: +SKIP
    """

    @property
    def site(self) -> Site:
        """The site whose activations are edited."""
        ...

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Edited activations of the same shape and dtype. It is called once per forward pass, so once per cached step."""
        ...


@runtime_checkable
class Gate(Protocol):
    """Decides for each token whether an intervention acts.

    Example:
        >>> acts = reading.tuned[Site(3)]  # doctest: +SKIP
        >>> gate(acts).float().mean()  # the share of tokens that the intervention changes  # doctest: +SKIP
    """

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """A mask that is True at the tokens on which the intervention acts."""
        ...


@runtime_checkable
class TransferMap(Protocol):
    """Maps activations of model A at a site to activations of model B at a site.

    Example:
        >>> acts = reading_of_a.tuned[transfer_map.source]  # doctest: +SKIP
        >>> mapped = transfer_map(acts.flatten(0, 1))  # doctest: +SKIP
    """

    @property
    def source(self) -> Site:
        """The site in model A."""
        ...

    @property
    def target(self) -> Site:
        """The site in model B."""
        ...

    def __call__(self, acts: Float[Tensor, "tokens d_source"]) -> Float[Tensor, "tokens d_target"]:
        """Mapped activations, one row per token."""
        ...
