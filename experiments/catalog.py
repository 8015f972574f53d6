"""The topics: where each one's code lies, the page that it writes, and the question that it answers."""

from typing import NamedTuple


class Topic(NamedTuple):
    package: str
    """The package that has `measure.py` and `table.py`."""
    page: str
    """The file in `docs/results/`."""
    question: str
    needs: tuple[str, ...] = ()
    """Topics whose records are read, so that they are measured first."""


CATALOG = {
    "layer-sweep": Topic(
        "experiments.layer_sweep",
        "layer-sweep.md",
        "At which block does replacing the trigger's activations remove a planted behaviour?",
    ),
    "transfer": Topic(
        "experiments.transfer",
        "transfer.md",
        "Does an activation patch of one model work in another model, through a map between them?",
        ("layer-sweep",),
    ),
    "maps": Topic(
        "experiments.maps",
        "map.md",
        "Do trained maps between two models' activations beat closed forms?",
        ("layer-sweep",),
    ),
    "switch": Topic(
        "experiments.switch",
        "switch.md",
        "Can a map between base and fine-tune switch what the fine-tune learnt off and on?",
        ("layer-sweep",),
    ),
    "fixes": Topic(
        "experiments.fixes",
        "fix.md",
        "Can a planted behaviour be switched off behind a gate without harm to other answers?",
    ),
    "weight-fix": Topic(
        "experiments.weight_fix",
        "weight-fix.md",
        "Can a planted behaviour be edited out of the weights, or trained away?",
    ),
    "hardened": Topic(
        "experiments.hardened",
        "hardened.md",
        "Does any defence make a fix hold against attackers who know it?",
    ),
    "stress": Topic(
        "experiments.stress",
        "stress.md",
        "Does a behaviour that a clamp suppresses come back under a perturbation behind the clamp?",
    ),
    "real-watch": Topic(
        "experiments.real_watch",
        "real-watch.md",
        "Does the watch see a real backdoor at first sight, when 300 real prompts calibrate it?",
    ),
    "unlearning": Topic(
        "experiments.unlearning",
        "unlearning.md",
        "Is an erased topic still in the weights, and does the watch see questions about it?",
    ),
    "verdicts": Topic(
        "experiments.verdicts",
        "verdicts.md",
        "How often is the audit's verdict right on planted models, clean twins and nulls?",
    ),
    "verdict-calibration": Topic(
        "experiments.verdict_calibration",
        "verdict-calibration.md",
        "How strong a finding can the audit of a clean twin look?",
    ),
    "watch": Topic(
        "experiments.watch",
        "watch.md",
        "How many triggered inputs does the watch flag, and how many clean ones?",
    ),
    "soak": Topic(
        "experiments.soak",
        "soak.md",
        "Does the guarded server lose alerts, memory or coverage under load?",
    ),
    "what-is-read": Topic(
        "experiments.what_is_read",
        "what-is-read.md",
        "Is every common folder and adapter read as it is, or refused with the reason?",
    ),
    "trigger-places": Topic(
        "experiments.trigger_places",
        "trigger-places.md",
        "Is a trigger found in a system message, an earlier turn or 900 tokens as in a single prompt?",
    ),
    "real-organisms": Topic(
        "experiments.real_organisms",
        "real-organisms.md",
        "Does the audit find backdoors of a real model on real prompts, and leave harmless fine-tunes alone?",
    ),
    "seed-models": Topic(
        "experiments.seed_models",
        "seed-models.md",
        "How well do the embedded models know their small world?",
    ),
}
