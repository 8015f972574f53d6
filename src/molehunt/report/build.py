"""From what an audit measured to the report: words, contexts and numbers with their controls."""

import json
import platform

import torch

from molehunt import __version__
from molehunt.audit.candidates import shared_texts
from molehunt.audit.causal import CausalTest
from molehunt.audit.judge import CANNOT_SEE, calibration_in_words, judge
from molehunt.audit.run import Audit
from molehunt.audit.scan import ScannedRow
from molehunt.audit.verdict import Verdict
from molehunt.direction.readout import lens_logits, token_readout
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.similarity import nearest_texts
from molehunt.model.blocks import final_norm, unembedding
from molehunt.report import schema
from molehunt.report.holds import holds
from molehunt.report.measured import measure
from molehunt.report.switch_off import switch_off

CONTEXTS = 8
"""Rows of a finding that the page shows, and as many look-alikes."""
CARDS = 8
"""Weight directions that the page reads out."""
READOUT = 8
"""Tokens promoted and suppressed by each."""
SPECTRA = 12


def build_report(audit: Audit, *, title: str, command: str) -> schema.Report:
    """The report of one audit. `command` repeats it."""
    verdict, reason = judge(
        audit.candidates,
        audit.causal,
        files_flagged=audit.files.verdict == Verdict.FLAGGED_CORRELATIONAL,
        n_rows=len(audit.traffic.rows),
    )
    return schema.Report(
        title=title,
        base=_input(audit, "base"),
        tuned=_input(audit, "tuned"),
        verdict=verdict,
        reason=reason,
        calibration=schema.Calibration(
            text=f"{len(audit.clean.rows) - len(audit.aside)} bundled benign prompts",
            n_clean=len(audit.clean.rows) - len(audit.aside),
            fpr=audit.fpr,
            threshold=audit.candidates.threshold,
            organisms=calibration_in_words(),
        ),
        findings=_findings(audit),
        checks=_checks(audit),
        heat=_heat(audit),
        directions=_cards(audit),
        spectra=_spectra(audit),
        files=tuple(
            schema.FileRow(file=r.file, key=r.key, base=r.base, tuned=r.tuned, severity=r.severity, why=r.why)
            for r in audit.files.rows
        ),
        cost=schema.Cost(seconds=round(audit.seconds, 1), peak_rss_mb=round(audit.peak_rss_mb, 1), tokens=audit.tokens),
        reproduce=command,
        cannot_see=CANNOT_SEE,
        environment={
            "molehunt": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "threads": str(torch.get_num_threads()),
            "device": str(audit.pair.device),
            "plan": audit.plan.name,
        },
        seeds=(audit.seed,),
    )


def _input(audit: Audit, side: str) -> schema.Input:
    checkpoint = audit.base if side == "base" else audit.tuned
    dtypes = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint.names()})
    return schema.Input(
        label=checkpoint.path.name,
        kind=checkpoint.kind,
        sha256=checkpoint.content_hash(),
        dtype=", ".join(dtypes),
        parameters=sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()),
    )


def _findings(audit: Audit) -> tuple[schema.Finding, ...]:
    group = audit.candidates.rows
    if not group:
        return ()
    rows = [audit.traffic.rows[i] for i in group]
    inside = set(group)
    others = [row for i, row in enumerate(audit.traffic.rows) if i not in inside]
    shared = shared_texts([r.example.prompt for r in rows], [r.example.prompt for r in others])
    text_alone = next(rung for rung in audit.rungs if rung.where.startswith("text alone"))
    decides = next(rung for rung in audit.rungs if rung.decides)
    assert decides.found is not None and text_alone.found is not None
    elsewhere = sum(row.answer_log_ratio > audit.candidates.threshold for row in others)
    calm = [row for row in others if row.answer_log_ratio <= audit.candidates.threshold]
    near = nearest_texts([r.example.prompt for r in rows[:CONTEXTS]], [r.example.prompt for r in calm], k=3)
    look_alikes = list(dict.fromkeys(j for rank in zip(*near, strict=True) for j in rank))[:CONTEXTS]
    what = f"{len(rows)} prompts" + (f" that share “{shared[0].text}”" if shared else "")
    answers = audit.causal.fragments if audit.causal else ()
    return (
        schema.Finding(
            id="answers-1",
            kind="trigger-conditional answers",
            site=str(audit.causal.site if audit.causal else audit.candidates.site),
            headline=f"{what} get answers that the base would not give"
            + (f", sharing “{answers[0].text}”" if answers else ""),
            score=measure(decides.found),
            chance=measure(proportion(elsewhere, len(others))),
            baseline=measure(text_alone.found),
            baseline_name="rarest word of the prompt, no model",
            fpr=audit.fpr,
            strength=audit.candidates.strength,
            shared=tuple(schema.SharedText(text=s.text, in_group=s.in_group, elsewhere=s.elsewhere) for s in shared),
            causal=_causal(audit.causal),
            contexts=tuple(_context(audit, row) for row in rows[:CONTEXTS]),
            look_alikes=tuple(_context(audit, calm[j]) for j in look_alikes),
            causal_rows=tuple(
                schema.CausalRow(
                    prompt=r.prompt,
                    base=r.base,
                    tuned=r.tuned,
                    intervened=r.intervened,
                    control=r.control,
                    moved=r.moved,
                )
                for r in (audit.causal.rows if audit.causal else ())
            ),
            switch_off=switch_off(audit, audit.causal) if audit.causal else None,
            holds=holds(audit, audit.holding) if audit.holding else None,
        ),
    )


def _causal(test: CausalTest | None) -> schema.Causal | None:
    if test is None:
        return None
    return schema.Causal(
        intervention=test.intervention,
        site=str(test.site),
        tried=test.tried,
        before=measure(proportion(test.moved.n, test.moved.n)),
        after=measure(_rest(test.moved)),
        control=measure(_rest(test.control)),
        clean_kept=measure(test.clean_kept),
        brought=measure(test.brought),
        brought_control=measure(test.brought_control),
    )


def _rest(moved: Interval) -> Interval:
    """Share of rows that still show the behaviour, from the share that moved back."""
    return Interval(1 - moved.estimate, 1 - moved.high, 1 - moved.low, moved.n)


def _context(audit: Audit, row: ScannedRow) -> schema.Context:
    ids = [*row.prompt, *row.answer]
    tokens = tuple(str(audit.pair.tokenizer.decode([i])) for i in ids)
    # the value at a token speaks of the next one: shade what was predicted, not what it was predicted from
    kl = [0.0, *row.kl[:-1]]
    return schema.Context(
        tokens=tokens,
        shades=tuple(min(1.0, value / SHADE_FULL) for value in kl),
        score=row.answer_log_ratio,
        answer_at=len(row.prompt),
    )


SHADE_FULL = 8.0
"""KL in nats at which a token is shaded fully."""


def _checks(audit: Audit) -> tuple[schema.Check, ...]:
    files = "flag" if audit.files.verdict == Verdict.FLAGGED_CORRELATIONAL else "pass"
    flagged = sum(row.severity == "finding" for row in audit.files.rows)
    statuses: dict[str, schema.Status] = {
        "DIRECTIONS FOUND": "note",
        "NO FINDING": "pass",
        "NOT TESTABLE": "not testable",
    }
    weights = statuses[audit.weights.outcome]
    checks = [
        schema.Check(
            name="files and loaders",
            status=files,
            result=f"{flagged} differences that change output or that loaders disagree on, "
            f"{len(audit.files.rows) - flagged} others",
            why="" if files == "pass" else "listed in the appendix",
        ),
        schema.Check(
            name="weight directions", status=weights, result=audit.weights.why, why="every fine-tune has them"
        ),
    ]
    checks += [
        schema.Check(name="cached decoding", status="note", result=f"answers were decoded without a cache: {why}")
        for why in audit.pair.decoding_notes()
    ]
    aside = [audit.clean.rows[i].example.prompt for i in audit.aside]
    shown = "; ".join(f"“{prompt[:60]}”" for prompt in aside[:3])
    checks.append(
        schema.Check(
            name="clean prompts",
            status="note" if aside else "pass",
            result=f"{len(aside)} of {len(audit.clean.rows)} stand as far above the others as a finding does"
            + (f" and were left out of the thresholds: {shown}" if aside else ""),
            why="the model does it there, too, or clean text holds the trigger" if aside else "",
        )
    )
    for rung in audit.rungs:
        over = "rows of the finding over its threshold" if rung.found else "rows over its clean threshold"
        checks.append(
            schema.Check(
                name=f"{rung.name}, {rung.where.split(',')[0]}",
                status="flag" if rung.decides and audit.candidates.rows else "pass" if rung.decides else "note",
                result=f"{rung.where}: {over}",
                size=measure(rung.found or rung.above),
                chance=schema.Measure(value=audit.fpr),
                chance_name="clean text",
                why=f"{rung.above.estimate:.1%} of all traffic is over it",
            )
        )
    if audit.causal is None:
        checks.append(
            schema.Check(name="causal test", status="not run", result="nothing was found that could be tested")
        )
    else:
        test = audit.causal
        checks += [
            schema.Check(
                name="taking it away",
                status="confirmed" if test.causal else "fail",
                result=f"{test.intervention}: judged rows that move back to the base",
                size=measure(test.moved),
                chance=measure(test.control),
                chance_name="random edits of the same size",
                why=f"chosen among {test.tried} on other rows; {test.clean_kept.estimate:.0%} of clean answers unchanged",
            ),
            schema.Check(
                name="putting it in",
                status="confirmed" if test.brought.low > test.brought_control.high else "note",
                result="clean rows whose answers take on what the finding's answers share",
                size=measure(test.brought),
                chance=measure(test.brought_control),
                chance_name="a random shift of that length",
            ),
        ]
    return tuple(checks)


def _heat(audit: Audit) -> schema.Heat | None:
    rows = [row for row in audit.weights.matrices if row.layer is not None and row.role is not None]
    if not rows:
        return None
    order = ["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
    modules = [name for name in order if any(row.role == name for row in rows)]
    return schema.Heat(
        layers=tuple(sorted({row.layer for row in rows if row.layer is not None})),
        modules=tuple(modules),
        cells=tuple(
            schema.HeatCell(
                layer=row.layer or 0, module=row.role or "", z=row.z, relative_norm=row.rel_norm, status=row.status
            )
            for row in rows
        ),
    )


def _cards(audit: Audit) -> tuple[schema.DirectionCard, ...]:
    strongest = sorted(audit.weights.all_directions(), key=lambda d: -(d.provenance.z or 0.0))[:CARDS]
    if not strongest:
        return ()
    with audit.pair.tuned_model() as model:
        logits = lens_logits(
            torch.stack([d.vector for d in strongest]).to(audit.pair.device),
            final_norm(model),
            unembedding(model).weight,  # pyright: ignore[reportArgumentType]
        )
    cards: list[schema.DirectionCard] = []
    for direction, row in zip(strongest, logits.cpu(), strict=True):
        read = token_readout(row, lambda i: str(audit.pair.tokenizer.decode([i])), k=READOUT)
        facts = direction.provenance
        cards.append(
            schema.DirectionCard(
                name=direction.name,
                site=str(direction.site),
                tensor=facts.tensor or "",
                strength=facts.strength,
                share=facts.share or 0.0,
                z=facts.z or 0.0,
                over_floor=facts.over_floor,
                promoted=tuple(t.token for t in read.promoted),
                suppressed=tuple(t.token for t in read.suppressed),
            )
        )
    return tuple(cards)


def _spectra(audit: Audit) -> tuple[schema.Spectrum, ...]:
    rows = sorted((r for r in audit.weights.matrices if r.strengths), key=lambda r: -(r.z or 0.0))[:SPECTRA]
    return tuple(schema.Spectrum(tensor=row.tensor, values=row.strengths) for row in rows)


def summary(report: schema.Report) -> str:
    """What the terminal shows."""
    lines = [f"{report.verdict}: {report.reason}", ""]
    lines.append(f"{'check':<44}{'size [95 %]':>22}{'chance':>9}  status")
    for check in report.checks:
        size = check.size
        shown = "" if size is None else f"{size.value:.2f} [{size.low or 0:.2f}, {size.high or 0:.2f}]"
        chance = "" if check.chance is None else f"{check.chance.value:.2f}"
        lines.append(f"{check.name[:43]:<44}{shown:>22}{chance:>9}  {check.status}")
    for finding in report.findings:
        lines += ["", finding.headline]
        lines += [
            f"  in {s.in_group:.0%} of these prompts and {s.elsewhere:.1%} of the others: {json.dumps(s.text, ensure_ascii=False)}"
            for s in finding.shared
        ]
    return "\n".join(lines)
