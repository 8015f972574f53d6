"""How to switch a finding off: the blocks where an edit does it, and the commands that use the fix."""

import shlex

from molehunt.audit.causal import CausalTest
from molehunt.audit.run import Audit
from molehunt.report.measured import measure
from molehunt.report.schema import BlockShare, Step, SwitchOff


def switch_off(audit: Audit, test: CausalTest) -> SwitchOff:
    """What the audit knows of the fix. Without one that beats random edits of its size there is no file and no command."""
    blocks = tuple(
        BlockShare(
            block=str(one.site),
            intervention=one.intervention,
            removed=measure(one.moved),
            control=measure(one.control),
        )
        for one in test.by_site
    )
    if audit.fix is None:
        return SwitchOff(blocks=blocks, file=None)
    pair = shlex.join([str(audit.base.path), str(audit.tuned.path)])
    fix = shlex.quote(str(audit.fix))
    steps = (
        Step(
            what="Answers with and without it, on prompts of your own, and what it costs on clean ones",
            command=f"molehunt steer try {pair} {fix} --prompts PROMPTS.jsonl",
        ),
        Step(
            what="Serve the model; each answer that leaves the range of clean traffic is steered, no other",
            command=f"molehunt serve {pair} --action steer",
        ),
    )
    return SwitchOff(blocks=blocks, file=audit.fix.name, steps=steps)
