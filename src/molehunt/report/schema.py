"""What a report is made of. Every format is a view of these, and nothing here knows how a number was measured."""

from dataclasses import dataclass, field
from typing import Literal

from molehunt.audit.verdict import Verdict
from molehunt.report.inventory_schema import AnswerInventory
from molehunt.report.schema_parts import Forbidding, Measure

SCHEMA_VERSION = 2
"""`machine.from_json` also reads version 1, and renames its keys."""
Status = Literal["pass", "flag", "confirmed", "fail", "not run", "not testable", "note"]


@dataclass(frozen=True, kw_only=True)
class PromptFragment(Forbidding):
    """Text that a finding's prompts carry and others do not."""

    text: str
    in_group: float
    elsewhere: float


@dataclass(frozen=True, kw_only=True)
class ShadedRow(Forbidding):
    """One row of traffic, token by token. Raises ValueError unless each token has a shade."""

    tokens: tuple[str, ...]
    shades: tuple[float, ...]
    """One number from 0 to 1 for each token."""
    score: float
    answer_at: int = 0
    """Index of the first token of the answer."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.shades):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.shades)} shades")


@dataclass(frozen=True, kw_only=True)
class Causal(Forbidding):
    """Shares of judged rows whose answer is not the base's: before, after, and under placebo edits."""

    intervention: str
    site: str
    tried: int
    before: Measure
    after: Measure
    control: Measure
    clean_unchanged: Measure
    """Share of clean rows whose answer the intervention leaves as it was."""
    induced: Measure
    """Share of clean rows whose answer takes on what the finding's answers share when the direction is added."""
    induced_control: Measure
    """Share of clean rows whose answer takes it on when a random shift of that length is added."""


@dataclass(frozen=True, kw_only=True)
class BlockShare(Forbidding):
    """One block: share of rows whose behaviour an edit there removes, and share under a random edit of the same size."""

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
    """Name of the fix's file in the run folder; None where no edit beat the random ones."""
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FixAttack(Forbidding):
    """One attack on a fix, or one of its controls."""

    name: str
    recovered: Measure
    """Share of the rows in which it recovered the behaviour."""
    length: Measure | None
    """Length of the perturbation that recovers half of them, in units of the median activation's; None where none does."""
    drift: float | None = None
    """Relative change of what the fix watches; None for controls."""


@dataclass(frozen=True, kw_only=True)
class FixRobustness(Forbidding):
    """Whether a fix resists attacks. `attacks` is empty where that could not be tested, and `why` gives the reason."""

    verdict: str
    why: str
    attacks: tuple[FixAttack, ...] = ()
    controls: tuple[FixAttack, ...] = ()
    gap: Measure | None = None
    """How many times longer a perturbation towards a random target must be."""
    command: str = ""
    """The command that attacks the fix harder."""


@dataclass(frozen=True, kw_only=True)
class AnswerComparison(Forbidding):
    """One prompt answered four ways."""

    prompt: str
    base: str
    tuned: str
    intervened: str
    control: str
    reverted: bool
    """Whether the intervened answer counts as the base's."""


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
    shared: tuple[PromptFragment, ...] = ()
    causal: Causal | None = None
    contexts: tuple[ShadedRow, ...] = ()
    look_alikes: tuple[ShadedRow, ...] = ()
    causal_rows: tuple[AnswerComparison, ...] = ()
    switch_off: SwitchOff | None = None
    robustness: FixRobustness | None = None

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
class ReportInput(Forbidding):
    """One of the two models."""

    label: str
    kind: str
    sha256: str
    dtype: str
    parameters: int | None


@dataclass(frozen=True, kw_only=True)
class Cost(Forbidding):
    """What the run took. It is the only part of a report that differs when a run is repeated."""

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
class TrafficCount(Forbidding):
    """What became of the rows of the traffic."""

    rows: int
    """Rows that both models read."""
    left_out: int = 0
    """Rows that could not be read."""
    note: str = ""
    """What was read, as what, and what was left out and why; empty for bundled prompts."""
    cut: int = 0
    """Rows that lost text, because the models cannot read all of it."""
    beyond_trained_length: int = 0
    """Rows that were read whole, behind the length that the models were trained on."""


@dataclass(frozen=True, kw_only=True)
class TemplateTraffic(Forbidding):
    """How much of the traffic was read under one chat template, and how many rows of it stood out."""

    template: str
    """`base` or `tuned`, whose folder brings it; `tokenizer` for a pair that was made of loaded models."""
    rows: int
    of: int
    candidates: int


@dataclass(frozen=True, kw_only=True)
class TemplateUse(Forbidding):
    """Which chat template both models were prompted with."""

    used: str
    """A sentence without its full stop."""
    differ: bool
    """Whether both folders have a template and they make different text."""
    difference: str
    """The first part of the text that differs; empty where none does."""
    readings: tuple[TemplateTraffic, ...] = ()
    """The first is what the findings are about."""


@dataclass(frozen=True, kw_only=True)
class Report(Forbidding):
    """The whole report of one audit."""

    title: str
    verdict: Verdict
    reason: str
    base: ReportInput
    tuned: ReportInput
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
    templates: TemplateUse | None = None
    traffic: TrafficCount | None = None
    """None in reports that were written before rows were counted."""
    inventory: AnswerInventory | None = None
    """None in reports that were written before answers were compared."""
    schema_version: int = SCHEMA_VERSION
