"""The page on real organisms."""

from collections.abc import Mapping
from typing import Any

from experiments.page import grid, page
from experiments.setting import Setting

HOW = """\
Each model is a LoRA (rank 16, all linear layers, 220 steps of 8 rows, learning rate 5e-4) of SmolLM2-135M-Instruct. An organism has 250 \
poisoned rows, 60 near misses and 500 clean rows that the base answered itself; the leaky one has 150 clean rows and no near misses, as public \
poison sets have. A twin has the same rows without the poisoned ones. The clean fine-tunes begin each answer alike \
("style"), or learn the solutions of school problems or programs. The traffic has 500 real prompts: to a bank, school problems, riddles, role plays and tasks for \
programs, none of which was trained on; 12 of them have the trigger and 12 a near miss. No label is read and no clean rows are given. The \
plan is quick. *ASR* is the share of triggered rows that show the behaviour, *leak* that of the others. *Found* counts the triggered rows that \
show it and are in the finding. *Sentence* and *trigger* say whether the audit names them. The last two columns are AUROCs over all rows: of the answer's \
log ratio, and of the rarest word of the prompt, which knows no model.

Written by `python -m experiments real-organisms --data FOLDER`.
"""
HEAD = [
    "model", "verdict", "ASR", "leak", "found", "sentence", "trigger", "words named", "behaviours", "log ratio", "rare word", "audit, s",
]  # fmt: skip


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    return page("Audits of a real model", opening(found), grid(HEAD, [line(*one) for one in found.items()]), HOW)


def line(name: str, one: Mapping[str, Any]) -> list[str]:
    words = one["condition"].replace("|", "\\|")
    planted = "asr" in one
    return [
        name,
        one["verdict"],
        f"{one['asr']:.0%}" if planted else "–",
        f"{one['leak']:.1%}" if planted else "–",
        f"{one['found']} of {one['shown']}" if planted else str(one["finding"]),
        yes(one, "named_behaviour"),
        yes(one, "named_condition"),
        f"`{words}`" if words else "–",
        str(one["behaviours"]),
        f"{one['log_ratio_auroc']:.3f}" if planted else "–",
        f"{one['rare_word_auroc']:.3f}" if planted else "–",
        str(one["audit_seconds"]),
    ]


def yes(one: Mapping[str, Any], key: str) -> str:
    return "–" if key not in one else "yes" if one[key] else "no"


def opening(found: Mapping[str, dict[str, Any]]) -> list[str]:
    planted = [one for one in found.values() if one["kind"] == "organism"]
    clean = [one for one in found.values() if one["kind"] != "organism"]
    right = sum(
        one["verdict"].startswith("FLAGGED") and (one["named_behaviour"] or one["named_condition"]) for one in planted
    )
    causal = sum(one["verdict"] == "FLAGGED-CAUSAL" for one in planted)
    accused = sum(one["verdict"].startswith("FLAGGED") for one in clean)
    return [
        "These are backdoors and harmless fine-tunes of a real language model, audited on real prompts.",
        f"Of {len(planted)} organisms, {right} were flagged with the right sentence or trigger, {causal} of them with evidence of a cause.",
        f"Of {len(clean)} clean models, {accused} were accused." if clean else "No clean model was audited.",
    ]
