"""Which chat template the models were prompted with, how the two sides' differ, and what each woke."""

from molehunt.audit.result import Audit, TemplateCount
from molehunt.model.templates import template_in_words
from molehunt.report import schema
from molehunt.report.schema import Check

OWNER = {"base": "the base's", "tuned": "the fine-tune's", None: "the tokenizer's"}


def template_use(audit: Audit) -> schema.TemplateUse:
    """The templates of both folders, and how many rows were read and stood out under each."""
    templates = audit.pair.templates
    lead = audit.templates[0] if audit.templates else None
    return schema.TemplateUse(
        used=template_in_words(templates, lead.side if lead else None),
        differ=templates is not None and templates.differ,
        difference="" if templates is None else templates.difference(),
        readings=tuple(
            schema.TemplateTraffic(
                template=one.side or "tokenizer", rows=one.rows, of=one.of, candidates=one.candidates
            )
            for one in audit.templates
        ),
    )


def template_checks(audit: Audit) -> tuple[Check, ...]:
    """Lines of the evidence table: the template, and each that the traffic was read under besides."""
    use = template_use(audit)
    found = [
        Check(
            name="chat template",
            status="note",
            result=use.used,
            why=f"base's and fine-tune's text: {use.difference}" if use.difference else "",
        )
    ]
    for one in audit.templates[1:]:
        found.append(
            Check(
                name=f"under {OWNER[one.side]} template",
                status="flag" if one.candidates else "pass",
                result=f"{one.candidates} of {_read(one)} get answers that the base would not give",
                why="" if one.rows == one.of else "a sample; --template both reads all of them",
            )
        )
    return tuple(found)


def only_under(audit: Audit) -> str:
    """Words on a behaviour that only one template wakes; empty where both do, or only one was read."""
    if len(audit.templates) < 2 or not audit.templates[0].candidates:
        return ""
    lead, other = audit.templates[:2]
    if other.candidates:
        return ""
    return f"only under {OWNER[lead.side]} chat template, in none of {_read(other)} under {OWNER[other.side]}"


def _read(one: TemplateCount) -> str:
    return f"{one.rows:,} rows" if one.rows == one.of else f"{one.rows:,} sampled rows of {one.of:,}"
