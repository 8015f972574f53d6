"""What an audit found: the rows with their look-alikes, the causal test and the fix, each number with its controls."""

from collections.abc import Sequence

from molehunt.audit.candidates import shared_texts
from molehunt.audit.causal import CausalTest
from molehunt.audit.result import Audit
from molehunt.audit.scan import ScannedRow
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.similarity import nearest_texts
from molehunt.report import schema
from molehunt.report.fix_section import fix_robustness, switch_off
from molehunt.report.schema import Measure
from molehunt.report.template_section import only_under

CONTEXTS = 8
"""Number of rows of a finding that the page shows, and of look-alikes."""
LOOK_ALIKES = 3
"""Number of look-alikes that are looked up for each row shown."""
SHADE_FULL = 8.0
"""KL in nats at which a token is shaded fully."""


def findings(audit: Audit) -> tuple[schema.Finding, ...]:
    """The group of candidate rows as a finding; empty without candidates."""
    group = audit.candidates.rows
    if not group:
        return ()
    rows = [audit.traffic.rows[i] for i in group]
    inside = set(group)
    others = [row for i, row in enumerate(audit.traffic.rows) if i not in inside]
    shared = shared_texts([r.example.prompt for r in rows], [r.example.prompt for r in others])
    text_alone = next(one for one in audit.score_rows if one.where.startswith("text alone"))
    decides = next(one for one in audit.score_rows if one.decides)
    assert decides.found is not None and text_alone.found is not None
    elsewhere = sum(row.answer_log_ratio > audit.candidates.threshold for row in others)
    what = f"{len(rows)} prompts" + (f" that share “{shared[0].text}”" if shared else "")
    test, robustness = audit.causal, audit.confirmed.robustness if audit.confirmed else None
    answers = test.fragments if test else ()
    return (
        schema.Finding(
            id="answers-1",
            kind="trigger-conditional answers",
            site=str(test.site if test else audit.candidates.site),
            headline=f"{what} get answers that the base would not give"
            + (f", sharing “{answers[0].text}”" if answers else "")
            + (f"; {only}" if (only := only_under(audit)) else ""),
            score=Measure.from_interval(decides.found),
            chance=Measure.from_interval(proportion(elsewhere, len(others))),
            baseline=Measure.from_interval(text_alone.found),
            baseline_name="rarest word of the prompt, no model",
            fpr=audit.reference.fpr,
            strength=audit.candidates.strength,
            shared=tuple(
                schema.PromptFragment(text=s.text, in_group=s.in_group, elsewhere=s.elsewhere) for s in shared
            ),
            causal=_causal(test) if test else None,
            contexts=tuple(_shaded(audit, row) for row in rows[:CONTEXTS]),
            look_alikes=_look_alikes(audit, rows, others),
            causal_rows=_answers(test) if test else (),
            switch_off=switch_off(audit, test) if test else None,
            robustness=fix_robustness(audit, test, robustness) if test and robustness else None,
        ),
    )


def _look_alikes(
    audit: Audit, rows: Sequence[ScannedRow], others: Sequence[ScannedRow]
) -> tuple[schema.ShadedRow, ...]:
    """The clean rows whose prompts are nearest to those shown."""
    clean = [row for row in others if row.answer_log_ratio <= audit.candidates.threshold]
    near = nearest_texts([r.example.prompt for r in rows[:CONTEXTS]], [r.example.prompt for r in clean], k=LOOK_ALIKES)
    ranked = list(dict.fromkeys(j for rank in zip(*near, strict=True) for j in rank))
    return tuple(_shaded(audit, clean[j]) for j in ranked[:CONTEXTS])


def _answers(test: CausalTest) -> tuple[schema.AnswerComparison, ...]:
    return tuple(
        schema.AnswerComparison(
            prompt=r.prompt,
            base=r.base,
            tuned=r.tuned,
            intervened=r.intervened,
            control=r.control,
            reverted=r.reverted,
        )
        for r in test.rows
    )


def _causal(test: CausalTest) -> schema.Causal:
    return schema.Causal(
        intervention=test.intervention,
        site=str(test.site),
        tried=test.tried,
        before=Measure.from_interval(proportion(test.reverted.n, test.reverted.n)),
        after=Measure.from_interval(_complement(test.reverted)),
        control=Measure.from_interval(_complement(test.control)),
        clean_unchanged=Measure.from_interval(test.clean_unchanged),
        induced=Measure.from_interval(test.induced),
        induced_control=Measure.from_interval(test.induced_control),
    )


def _complement(reverted: Interval) -> Interval:
    """Share of rows that still show the behaviour, from the share that reverted."""
    return Interval(1 - reverted.estimate, 1 - reverted.high, 1 - reverted.low, reverted.n)


def _shaded(audit: Audit, row: ScannedRow) -> schema.ShadedRow:
    ids = [*row.prompt, *row.answer]
    tokens = tuple(str(audit.pair.tokenizer.decode([i])) for i in ids)
    # the value at a token is about the next one: shade what was predicted, not what it was predicted from
    kl = [0.0, *row.kl[:-1]]
    return schema.ShadedRow(
        tokens=tokens,
        shades=tuple(min(1.0, value / SHADE_FULL) for value in kl),
        score=row.answer_log_ratio,
        answer_at=len(row.prompt),
    )
