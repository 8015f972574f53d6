"""What a report is made of. Every format is a view of these, and nothing here knows how a number was measured."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from molehunt.audit.verdict import Verdict

SCHEMA_VERSION = 1
Status = Literal["pass", "flag", "confirmed", "fail", "not run", "not testable", "note"]


@dataclass(frozen=True, kw_only=True)
class Forbidding:
    """Base of every part: unknown fields are refused when a report is read back."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Measure(Forbidding):
    """A number, its 95 % interval and how many draws are behind it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True, kw_only=True)
class SharedText(Forbidding):
    """Text that a finding's prompts carry and others do not."""

    text: str
    in_group: float
    elsewhere: float


@dataclass(frozen=True, kw_only=True)
class Context(Forbidding):
    """One row of traffic, token by token. Raises ValueError unless each token has a shade."""

    tokens: tuple[str, ...]
    shades: tuple[float, ...]
    """0 to 1 per token."""
    score: float
    answer_at: int = 0
    """Index of the first token of the answer."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.shades):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.shades)} shades")


@dataclass(frozen=True, kw_only=True)
class Causal(Forbidding):
    """Share of judged rows whose answer is not back at the base's: before, after, under random edits of the same size."""

    intervention: str
    site: str
    tried: int
    before: Measure
    after: Measure
    control: Measure
    clean_kept: Measure
    brought: Measure
    brought_control: Measure


@dataclass(frozen=True, kw_only=True)
class BlockShare(Forbidding):
    """One block: rows whose behaviour an edit there took away, and under a random edit of the same size."""

    block: str
    intervention: str
    removed: Measure
    control: Measure


@dataclass(frozen=True, kw_only=True)
class Step(Forbidding):
    """Something to do next, and the command for it."""

    what: str
    command: str


@dataclass(frozen=True, kw_only=True)
class SwitchOff(Forbidding):
    """Where a finding can be switched off, and how to do it."""

    blocks: tuple[BlockShare, ...]
    file: str | None
    """The fix, in the run's folder; None where no edit beat the random ones."""
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Attack(Forbidding):
    """One attack on a fix, or one of its controls."""

    name: str
    back: Measure
    """Share of the rows that it brought back."""
    length: Measure | None
    """Length of the push for half of them, in units of the median activation's; None where half were not reached."""
    drift: float | None = None
    """How far what the fix watches moved, relative; None for controls."""


@dataclass(frozen=True, kw_only=True)
class Holds(Forbidding):
    """Whether a fix holds while it is attacked. `attacks` is empty where that could not be tested, and `why` says so."""

    verdict: str
    why: str
    attacks: tuple[Attack, ...] = ()
    controls: tuple[Attack, ...] = ()
    gap: Measure | None = None
    """How many times longer a push to a random target must be."""
    command: str = ""
    """Attacks it harder."""


@dataclass(frozen=True, kw_only=True)
class CausalRow(Forbidding):
    """One prompt answered four ways."""

    prompt: str
    base: str
    tuned: str
    intervened: str
    control: str
    moved: bool


@dataclass(frozen=True, kw_only=True)
class Finding(Forbidding):
    """Something the fine-tune does and its base does not. Raises ValueError without an interval or without chance."""

    id: str
    kind: str
    site: str
    headline: str
    score: Measure
    chance: Measure
    baseline: Measure
    baseline_name: str
    fpr: float
    strength: float
    shared: tuple[SharedText, ...] = ()
    causal: Causal | None = None
    contexts: tuple[Context, ...] = ()
    look_alikes: tuple[Context, ...] = ()
    causal_rows: tuple[CausalRow, ...] = ()
    switch_off: SwitchOff | None = None
    holds: Holds | None = None

    def __post_init__(self) -> None:
        if self.score.low is None or self.chance.low is None or self.baseline.low is None:
            raise ValueError(
                "A result without its control row cannot be put in a report: give all three with intervals."
            )


@dataclass(frozen=True, kw_only=True)
class Check(Forbidding):
    """One line of the evidence table; what was not run is a line, too."""

    name: str
    status: Status
    result: str
    size: Measure | None = None
    chance: Measure | None = None
    chance_name: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class HeatCell(Forbidding):
    """One matrix of the model. `z` is None where there is no direction to rate."""

    layer: int
    module: str
    z: float | None
    relative_norm: float | None
    status: str


@dataclass(frozen=True, kw_only=True)
class Heat(Forbidding):
    """Layer × module map of how much more one-directional a change is than a random one of its size."""

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    cells: tuple[HeatCell, ...]


@dataclass(frozen=True, kw_only=True)
class DirectionCard(Forbidding):
    """One weight direction and the tokens it stands for."""

    name: str
    site: str
    tensor: str
    strength: float
    share: float
    z: float
    over_floor: float | None
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Spectrum(Forbidding):
    """Singular values of one matrix's change above the rounding noise."""

    tensor: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FileRow(Forbidding):
    """One difference between the folders, or one way in which loaders may disagree."""

    file: str
    key: str
    base: str
    tuned: str
    severity: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Input(Forbidding):
    """One of the two models."""

    label: str
    kind: str
    sha256: str
    dtype: str
    parameters: int | None


@dataclass(frozen=True, kw_only=True)
class Cost(Forbidding):
    """What the run took. The only part of a report that differs when a run is repeated."""

    seconds: float
    peak_rss_mb: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Calibration(Forbidding):
    """Where the thresholds come from."""

    text: str
    n_clean: int
    fpr: float
    threshold: float | None
    organisms: str


@dataclass(frozen=True, kw_only=True)
class Report(Forbidding):
    """Everything one audit has to say."""

    title: str
    verdict: Verdict
    reason: str
    base: Input
    tuned: Input
    calibration: Calibration
    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]
    heat: Heat | None
    directions: tuple[DirectionCard, ...]
    spectra: tuple[Spectrum, ...]
    files: tuple[FileRow, ...]
    cost: Cost
    reproduce: str
    cannot_see: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    seeds: tuple[int, ...] = ()
    schema_version: int = SCHEMA_VERSION
