"""What one audit measured, and the settings that determined it."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from molehunt.audit.candidates import Candidates
from molehunt.audit.causal import CausalTest
from molehunt.audit.files import FolderComparison
from molehunt.audit.input_test import TestedBehaviour
from molehunt.audit.inventory import Inventory
from molehunt.audit.plan import Plan
from molehunt.audit.reference import Reference
from molehunt.audit.robustness import RobustnessTest
from molehunt.audit.scan import Scan
from molehunt.audit.score_table import ScoreRow
from molehunt.audit.weight_comparison import WeightComparison
from molehunt.checkpoint.reader import AdapterChoice, Checkpoint
from molehunt.model.pair import ModelPair
from molehunt.model.templates import Side, TemplateChoice
from molehunt.steer.fix import Fix
from molehunt.traffic.left_out import ReadRows

DEFAULT_FPR = 0.01
FIX = "fix.safetensors"
"""Name of the file in the run folder that holds the interventions which switch the finding off."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What determines an audit, besides the two models and the traffic."""

    plan: Plan
    """How much is read."""
    clean: ReadRows | None = None
    """Rows without the behaviour, of the traffic's kind; None where the user has none."""
    fpr: float = DEFAULT_FPR
    """False-positive rate, per prompt, of the clean threshold."""
    seed: int = 0
    """Seed of everything random."""
    adapter: AdapterChoice = "refuse"
    """What is read of a folder that holds full weights and an adapter."""
    reference: Path | None = None
    """Folder of a harmless fine-tune whose answers the fine-tune's are compared with; None for the base's."""
    template: TemplateChoice | None = None
    """Whose chat template the traffic is read under; None for the fine-tune's, and a sample under the base's if they differ."""


@dataclass(frozen=True, kw_only=True)
class TemplateCount:
    """How much of the traffic was read under one chat template, and how much of it stood out."""

    side: Side | None
    """Whose template it is; None for a pair's own tokenizer."""
    rows: int
    of: int
    """Number of rows of the whole traffic."""
    candidates: int


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What interventions showed about a group of rows."""

    causal: CausalTest
    fix: Fix | None = None
    """The edit that switches the finding off; None where no edit beat random ones."""
    robustness: RobustnessTest | None = None
    """The attack on the fix; None where there is no fix."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Everything that one audit measured; `report.build.build_report` turns it into pages."""

    base: Checkpoint
    tuned: Checkpoint
    config: AuditConfig
    files: FolderComparison
    weights: WeightComparison
    pair: ModelPair
    reference: Reference
    """What the traffic is compared with."""
    traffic: Scan
    candidates: Candidates
    inventory: Inventory
    """What the fine-tune's answers to the traffic say and the base's do not."""
    tested: tuple[TestedBehaviour, ...]
    """The suspect ones among them, and what editing prompts showed."""
    confirmed: Confirmation | None
    """What interventions showed; None without candidate rows."""
    score_rows: tuple[ScoreRow, ...]
    folder: Path
    seconds: float
    reading: str = ""
    """What was read of the traffic, as what, and what was left out; empty for bundled prompts."""
    left_out: str = ""
    """How many rows of the traffic could not be read and why, as one sentence; empty where none was left out."""
    left_out_rows: int = 0
    templates: tuple[TemplateCount, ...] = ()
    """What was read under each chat template; everything else in here is about the first one."""

    @property
    def hidden(self) -> tuple[TestedBehaviour, ...]:
        """Behaviours that words of the prompt bring: rare, never the base's, and shown wherever the words are put in."""
        return tuple(one for one in self.tested if one.causal)

    @property
    def causal(self) -> CausalTest | None:
        """The causal test; None without candidate rows."""
        return self.confirmed.causal if self.confirmed else None

    @property
    def fix(self) -> Path | None:
        """The file of the edit that was shown to switch the finding off; None where no edit was."""
        return self.folder / FIX if self.confirmed and self.confirmed.fix else None

    @property
    def cut_rows(self) -> int:
        """Rows of the traffic that lost text, because the models cannot read all of it."""
        return sum(row.left_out > 0 for row in self.traffic.rows)

    @property
    def beyond_rows(self) -> int:
        """Rows of the traffic that were read whole, behind the length that the models were trained on."""
        trained = self.pair.context.trained
        if trained is None:
            return 0
        longest = trained - self.config.plan.max_new_tokens
        return sum(not row.left_out and len(row.prompt) > longest for row in self.traffic.rows)

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens that went through both models in the scan."""
        scans = [self.traffic] if self.reference.kind == "the traffic itself" else [self.reference.scan, self.traffic]
        return sum(len(row.prompt) + len(row.answer) for one in scans for row in one.rows)

    @property
    def peak_rss_mb(self) -> float:
        """Largest resident size of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**10 if sys.platform != "darwin" else peak / 2**20
