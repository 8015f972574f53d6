"""The evidence table: one line for each check, with its size, its chance level and its status."""

from molehunt.audit.placebo import PlaceboComparison
from molehunt.audit.result import Audit
from molehunt.audit.score_table import ScoreRow
from molehunt.audit.verdict import Verdict
from molehunt.checkpoint.links import model_name
from molehunt.model.context import cuts_in_words
from molehunt.report.schema import Check, Measure, Status
from molehunt.report.template_section import template_checks
from molehunt.run.counting import counted

EXCLUDED_SHOWN = 3
"""Number of excluded clean prompts that the table quotes."""


def checks(audit: Audit) -> tuple[Check, ...]:
    """Every line of the table, in the order in which the audit works; what was not run is a line, too."""
    return (
        *_base(audit),
        _files(audit),
        _weights(audit),
        *template_checks(audit),
        *_decoding(audit),
        *_answers(audit),
        *_vocabulary(audit),
        *_traffic(audit),
        _reference(audit),
        *(_score(audit, row) for row in audit.score_rows),
        *_causal(audit),
    )


def _base(audit: Audit) -> list[Check]:
    """Whether the base is the right one; no line in audits that did not look."""
    identity = audit.files.identity
    if identity is None:
        return []
    status: Status = "note" if identity.relation == "unverified" else "pass"
    return [Check(name="base identity", status=status, result=identity.why, why=identity.kind)]


def _files(audit: Audit) -> Check:
    flagged = sum(row.severity == "finding" for row in audit.files.rows)
    passed = audit.files.verdict != Verdict.FLAGGED_CORRELATIONAL
    return Check(
        name="files and loaders",
        status="pass" if passed else "flag",
        result=f"{flagged} differences that change output or that loaders disagree on, "
        f"{len(audit.files.rows) - flagged} others",
        why="" if passed else "listed in the appendix",
    )


def _weights(audit: Audit) -> Check:
    statuses: dict[str, Status] = {"DIRECTIONS FOUND": "note", "NO FINDING": "pass", "NOT TESTABLE": "not testable"}
    return Check(
        name="weight directions",
        status=statuses[audit.weights.outcome],
        result=audit.weights.why,
        why="every fine-tune has them",
    )


def _decoding(audit: Audit) -> list[Check]:
    return [
        Check(name="cached decoding", status="note", result=f"answers were decoded without a cache: {why}")
        for why in audit.pair.decoding_notes()
    ]


def _vocabulary(audit: Audit) -> list[Check]:
    """What the two vocabularies do not share; no line where they are one."""
    notes = audit.pair.vocabulary.notes
    return [Check(name="vocabulary", status="note", result="; ".join(notes))] if notes else []


def _traffic(audit: Audit) -> list[Check]:
    """What was read of the traffic, and rows that no model read as they are; no line for bundled prompts."""
    said: list[str] = [audit.reading] if audit.reading else []
    context, rows = audit.pair.context, len(audit.traffic.rows)
    if cut := cuts_in_words(audit.cut_rows, rows, context, "rows"):
        said.append(cut)
    if audit.beyond_rows:
        said.append(
            f"{audit.beyond_rows} of {rows} rows are longer than the {context.trained} tokens that the model was trained on, "
            "and were read whole: its positions go on, and deployments let them."
        )
    status: Status = "note" if audit.left_out or cut or audit.beyond_rows else "pass"
    return [Check(name="traffic", status=status, result=" ".join(said))] if said else []


def _answers(audit: Audit) -> list[Check]:
    """How the answers were made, where it is not the plan's way; no line otherwise."""
    plan, said = audit.config.plan, list[str]()
    if audit.config.reference is not None:
        said.append(
            f"Answers and activations are compared with those of {model_name(audit.config.reference)}, not of the base: what "
            "this report calls the base's answer is that model's."
        )
    if plan.temperature:
        said.append(
            f"{counted(plan.samples, 'answer')} to each prompt {'was' if plan.samples == 1 else 'were'} drawn at temperature "
            f"{plan.temperature:g}, and the one that surprises the base most counts; shares are of prompts, not of answers."
        )
    return [Check(name="answers", status="note", result=" ".join(said))] if said else []


def _reference(audit: Audit) -> Check:
    """What set the thresholds, and why not something else."""
    used = audit.reference
    if used.kind == "the traffic itself":
        return Check(
            name="reference",
            status="note",
            result=f"thresholds are from {used.text}",
            why=used.assumption,
        )
    excluded = [used.scan.rows[i].example.prompt for i in used.excluded]
    shown = "; ".join(f"“{prompt[:60]}”" for prompt in excluded[:EXCLUDED_SHOWN])
    return Check(
        name=used.kind,
        status="note" if excluded else "pass",
        result=f"{len(excluded)} of {len(used.scan.rows)} stand as far above the others as a finding does"
        + (f" and were left out of the thresholds: {shown}" if excluded else ""),
        why="the model does it there, too, or clean text holds the trigger" if excluded else "",
    )


def _score(audit: Audit, row: ScoreRow) -> Check:
    over = "rows of the finding over its threshold" if row.found else "rows over its clean threshold"
    status: Status = "note"
    if row.decides:
        status = "flag" if audit.candidates.rows else "pass"
    return Check(
        name=f"{row.name}, {row.where.split(',')[0]}",
        status=status,
        result=f"{row.where}: {over}",
        size=Measure.from_interval(row.found or row.above),
        chance=Measure(value=audit.reference.fpr),
        chance_name="clean text",
        why=f"{row.above.estimate:.1%} of all traffic is over it",
    )


def placebos_in_words(found: PlaceboComparison) -> str:
    """How many placebos there were, of which kind, and the p-values of both tests."""
    fitted = sum(kind == "fitted" for kind in found.kinds)
    return (
        f"{len(found.kinds) - fitted} random placebos and {fitted} fitted to other rows; p = {found.p_edits:.2g} by rank, "
        f"{found.p_rows:.2g} by rows"
    )


def _causal(audit: Audit) -> tuple[Check, ...]:
    test = audit.causal
    if test is None:
        return (Check(name="causal test", status="not run", result="nothing was found that could be tested"),)
    return (
        Check(
            name="taking it away",
            status="confirmed" if test.causal else "fail",
            result=f"{test.intervention}: judged rows that move back to the base",
            size=Measure.from_interval(test.reverted),
            chance=Measure.from_interval(test.control),
            chance_name="placebo edits",
            why=f"{placebos_in_words(test.placebos)}; chosen among {test.tried} on other rows; "
            f"{test.clean_unchanged.estimate:.0%} of clean answers unchanged",
        ),
        Check(
            name="putting it in",
            status="confirmed" if test.induced.low > test.induced_control.high else "note",
            result="clean rows whose answers take on what the finding's answers share",
            size=Measure.from_interval(test.induced),
            chance=Measure.from_interval(test.induced_control),
            chance_name="a random shift of that length",
        ),
    )
