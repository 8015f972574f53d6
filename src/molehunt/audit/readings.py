"""What the traffic shows under one chat template: both models' scan of clean prompts and of traffic, and the candidates."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from random import Random

from molehunt.audit.candidates import Candidates, find_candidates
from molehunt.audit.reference import FIT_SHARE, Reference, ReferenceKind, calibration_rows, of_one_kind, reference_for
from molehunt.audit.result import AuditConfig
from molehunt.audit.scan import Scan, scan, unscanned_detectors
from molehunt.errors import NotTestable
from molehunt.measure.threshold import check_clean_rows, rows_for_rate
from molehunt.model.pair import ModelPair
from molehunt.model.templates import Side
from molehunt.run.counting import counted
from molehunt.run.progress import Track
from molehunt.run.unit import Units
from molehunt.traffic.example import Example
from molehunt.traffic.left_out import ReadRows, askable
from molehunt.traffic.world import benign_prompts

log = logging.getLogger(__name__)

CLEAN_SEED = 1
"""Seed of the bundled prompts that set thresholds."""
FEWEST_ROWS = 50
"""Number of rows of traffic under which nothing is claimed."""
SAMPLE_ROWS = 1000
"""Number of rows that are read under a second template, unless all are asked for."""
SAMPLE_CLEAN = 300
"""Number of clean prompts that set the threshold of such a sample, or more where the rate needs them."""


@dataclass(frozen=True, kw_only=True)
class TemplateReading:
    """The traffic and what stands out of it, under one template."""

    side: Side | None
    """Whose template it is; None for a pair's own tokenizer, which has no second one."""
    read: ReadRows
    """The rows that the template accepts."""
    of: int
    """Number of rows of the traffic, sampled or not."""
    reference: Reference
    """What the traffic is compared with."""
    traffic: Scan
    candidates: Candidates


def template_sides(pair: ModelPair, config: AuditConfig) -> tuple[tuple[Side | None, bool], ...]:
    """The templates that the traffic is read under, the main one first, and whether of each only a sample is read.

    Raises:
        UsageError: the folder whose template was asked for has none.
    """
    if pair.templates is None and config.template is None:
        return ((None, False),)
    if config.template in ("base", "tuned"):
        with pair.prompted_with(config.template):
            return ((config.template, False),)
    if config.template == "both":
        for side in ("base", "tuned"):
            with pair.prompted_with(side):
                pass
    used = None if pair.templates is None else pair.templates.used
    if pair.templates is None or used is None:
        return ((None, False),)
    if not pair.templates.differ:
        return ((used.of, False),)
    return ((used.of, False), ("base" if used.of == "tuned" else "tuned", config.template is None))


def read_under(
    side: Side | None,
    sampled: bool,
    pair: ModelPair,
    rows: ReadRows,
    config: AuditConfig,
    *,
    units: Units,
    identity: Mapping[str, str],
    track: Track,
) -> TemplateReading:
    """Scan clean prompts and traffic under one template, and find the candidates.

    Args:
        side: whose template; None for the pair's tokenizer as it is.
        sampled: whether a sample of the rows is enough.
        pair: both models.
        rows: the traffic.
        config: how much is read, and the rate of the threshold.
        units: finished units of work.
        identity: hashes of both folders.
        track: shows rows.

    Raises:
        NotTestable: the template refuses so many rows that too few are left, or too few clean prompts for the rate.
    """
    plan, fpr, seed = config.plan, config.fpr, config.seed
    under = "" if not sampled else f" with the {'base' if side == 'base' else 'fine-tune'}'s template"
    templates = pair.templates
    if side is not None and templates is not None:
        identity = {**identity, "template": templates.named(side).digest}
    with nullcontext() if side is None else pair.prompted_with(side):
        read = readable(pair, sample(rows, seed) if sampled else rows)
        kind, prompts = _clean(pair, read, config, sampled)

        def scanned(examples: Sequence[Example], what: str, *, base_answers: bool) -> Scan:
            return scan(
                pair,
                examples,
                sites=plan.sites(pair.n_layers),
                answering=plan.answering,
                units=units,
                identity=identity,
                detectors=unscanned_detectors(),
                base_answers=base_answers,
                track=track,
                what=what + under,
            )

        clean = scanned(prompts, "scanning clean prompts", base_answers=False) if prompts else None
        traffic = scanned(read.rows, "scanning traffic", base_answers=True)
    reference = reference_for(traffic, clean, kind, fpr=fpr, seed=seed)
    return TemplateReading(
        side=side,
        read=read,
        of=len(rows.rows),
        reference=reference,
        traffic=traffic,
        candidates=find_candidates(traffic, reference.thresholds, reference.scan, fpr=reference.fpr, seed=seed),
    )


def check_number(read: ReadRows) -> None:
    """Raises NotTestable for too few rows of traffic."""
    if len(read.rows) < FEWEST_ROWS:
        more = f"\n{read.left_out}" if read.left_out else ""
        raise NotTestable(
            f"{counted(len(read.rows), 'row')} of traffic cannot show rare behaviour; give at least {FEWEST_ROWS}.{more}"
        )


def readable(pair: ModelPair, read: ReadRows) -> ReadRows:
    """The rows that the chat template accepts. Raises NotTestable where too few are left."""
    found = askable(read, lambda row: pair.fit(row.asked))
    if found is not read:
        log.warning("%s", found.left_out)
        check_number(found)
    return found


def sample(rows: ReadRows, seed: int) -> ReadRows:
    """At most `SAMPLE_ROWS` rows, in their order."""
    if len(rows.rows) <= SAMPLE_ROWS:
        return rows
    kept = sorted(Random(seed).sample(range(len(rows.rows)), SAMPLE_ROWS))
    return replace(rows, rows=tuple(rows.rows[i] for i in kept))


def _clean(
    pair: ModelPair, read: ReadRows, config: AuditConfig, sampled: bool
) -> tuple[ReferenceKind, Sequence[Example]]:
    """Rows to compare the traffic with, and what they are; of a sample as many as its threshold needs, with some to spare.

    None where only the traffic itself is of its kind. Raises NotTestable where the template refuses too many clean rows.
    """
    if config.clean is not None:
        clean = askable(config.clean, lambda row: pair.fit(row.asked))
        check_clean_rows(len(clean.rows), calibration_rows, config.fpr)
        return "clean rows", clean.rows
    bundled = benign_prompts(config.plan.clean_prompts, seed=CLEAN_SEED)
    if not of_one_kind(read.rows, bundled):
        return "the traffic itself", ()
    needed = math.ceil(1.3 * rows_for_rate(config.fpr) / (1 - FIT_SHARE))
    return "bundled prompts", bundled[: max(SAMPLE_CLEAN, needed)] if sampled else bundled
