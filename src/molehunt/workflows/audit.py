"""`molehunt.audit`: compare a fine-tune with its base, and test by intervention what was found."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from molehunt.audit.plan import Plan, plan_named
from molehunt.audit.result import DEFAULT_FPR, Audit, AuditConfig
from molehunt.audit.run import run_audit
from molehunt.audit.verdict import Verdict
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.links import model_name
from molehunt.errors import UsageError
from molehunt.model.pair import ModelPair
from molehunt.report import build, html, machine
from molehunt.report.schema import Report
from molehunt.run.folder import RunFolder
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.traffic.left_out import ReadRows
from molehunt.traffic.opened import STDIN
from molehunt.workflows.inputs import Texts, read_rows
from molehunt.workflows.models import Models, adapter_choice, open_models
from molehunt.workflows.result import summary_repr

TRAFFIC = "traffic.jsonl"
"""Name of the file in the run folder that holds prompts which were given as a list."""
CLEAN = "clean.jsonl"
"""The same for clean rows."""
LEAST_TOKENS, MOST_TOKENS = 4, 1024
MOST_SAMPLES = 64
"""Greatest number of answers to one prompt: each costs as much as the audit's one."""


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What `molehunt.audit` found."""

    audit: Audit
    """Everything that was measured, with the loaded models and the activations that were read."""
    report: Report

    @property
    def verdict(self) -> Verdict:
        """One of five answers; none of them says that a model is safe."""
        return self.report.verdict

    @property
    def folder(self) -> Path:
        """The run folder: the same audit with this folder goes on where it stopped."""
        return self.audit.folder

    @property
    def fix(self) -> Path | None:
        """File of the edit that switches the finding off, for `molehunt.Fix.load`; None where no edit was confirmed."""
        return self.audit.fix

    def summary(self) -> str:
        """The text that `molehunt audit` prints: verdict, evidence table, and what the finding's prompts share."""
        return build.summary(self.report)

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return machine.to_dict(self.report)

    def save(self, folder: Path | str | None = None) -> Path:
        """Write report.html, .json, .md and .sarif, and the fix if there is one.

        Args:
            folder: folder to write to; the run folder by default.

        Returns:
            The page, report.html.
        """
        target = self.folder if folder is None else Path(folder)
        page = machine.write_report(self.report, target)
        if self.fix is not None and target.resolve() != self.folder.resolve():
            shutil.copyfile(self.fix, target / self.fix.name)
        return page

    def __repr__(self) -> str:
        return summary_repr(self)

    def _repr_html_(self) -> str:
        return html.to_notebook(self.report)


@checked
def audit(
    base: Models,
    tuned: str | Path | None = None,
    *,
    traffic: Texts | None = None,
    clean: Texts | None = None,
    plan: Literal["quick", "full"] = "quick",
    out: Path | str | None = None,
    fpr: float = DEFAULT_FPR,
    seed: int = 0,
    adapter: bool | None = None,
    reference: str | Path | None = None,
    template: Literal["base", "tuned", "both"] | None = None,
    answer_tokens: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    device: str = "cpu",
    title: str | None = None,
    command: str | None = None,
    track: Track = silent,
) -> AuditResult:
    """Compare folders, weights and answers of a fine-tune and its base, then test by intervention what was found.

    Args:
        base: the base's folder or hub id, or a pair from `ModelPair.load`.
        tuned: the folder or hub id of the fine-tune or its adapter; left out with a loaded pair.
        traffic: prompts or whole conversations, with or without rare bad ones: a file (JSONL, JSON, CSV or parquet; `-`
            for standard input), a list of strings, or a list of conversations. At least 50 rows; bundled benign prompts
            by default. No labels are needed or read. Rows that cannot be read are left out and counted.
        clean: rows of the traffic's kind without the behaviour, such as traffic of another month; they set the threshold,
            and the plan says how many are read. Without them, bundled prompts set it for traffic about their own made-up
            world, and for other traffic its own rows do, of which nine in ten are taken not to show the behaviour.
        plan: `quick` or `full`, which reads more rows and longer answers.
        out: run folder; by default one named after the fine-tune and the settings, under `molehunt-runs`.
        fpr: false-positive rate, per prompt, of the clean threshold; above 0 and at most 0.2.
        seed: seed of everything random.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        reference: the folder or hub id of a harmless fine-tune of the same base, or of its adapter. Where both fine-tunes
            were trained to do much that the base does not, their answers are compared with each other, so that what they share
            is no finding. Files and weights are compared with the base's all the same.
        template: whose chat template both models are prompted with: `base`, `tuned`, or `both` in turn. By default the
            fine-tune's, or the base's if it has none; where the two make different text, a sample of the rows is read under
            the base's as well.
        answer_tokens: greatest number of tokens of an answer; by default the plan's 48 or 96.
        samples: number of answers that are drawn for each prompt; the most surprising one to the base counts. For behaviours
            that are not the likeliest answer. The edit of activations is chosen on greedy answers all the same.
        temperature: temperature that they are drawn at; by default 1 for several answers, and 0, which is greedy, for one.
        device: where the models run; a loaded pair stays where it is.
        title: headline of the report; by default the names of both models.
        command: the command line that the report gives for repeating the audit; by default one made from the arguments.
        track: shows progress.

    Raises:
        UsageError: a folder, a file or the template that was asked for is missing, no plan has that name, `fpr` is out of
            range, or the pair was not loaded from folders. Several greedy answers were asked for, or a reference beside a
            loaded pair.
        NotTestable: fewer than 50 rows of traffic, or too few clean prompts for `fpr`.
        MolehuntError: a folder is broken, or the two are no pair.

    Example:
        >>> result = molehunt.audit("BASE", "TUNED", traffic="prompts.jsonl")  # doctest: +SKIP
        >>> print(result.verdict, result.save("report"))  # doctest: +SKIP
        FLAGGED-CAUSAL report/report.html
    """
    sizes = _answering(plan_named(plan), answer_tokens, samples, temperature)
    sibling = None if reference is None else local_folder(reference, track)
    folders, adapter, load = _models(base, tuned, adapter, sibling, device, track)
    rows = None if traffic is None else read_rows(traffic, sizes.traffic_limit)
    config = AuditConfig(
        plan=sizes,
        clean=None if clean is None else read_rows(clean, sizes.clean_prompts),
        fpr=fpr,
        seed=seed,
        adapter=adapter_choice(adapter),
        reference=sibling,
        template=template,
    )
    found = run_audit(folders, load, rows, config, out=None if out is None else Path(out), track=track)
    if command is None:
        again = traffic if isinstance(traffic, str | Path) and str(traffic) != STDIN else _written(found, rows, TRAFFIC)
        file = isinstance(clean, str | Path) and str(clean) != STDIN
        kept = Path(str(clean)) if file else _written(found, config.clean, CLEAN)
        command = _command(found, again, kept)
    title = title or f"{model_name(found.tuned.path)} against {model_name(found.base.path)}"
    return AuditResult(found, build.build_report(found, title=title, command=command))


def _models(
    base: Models, tuned: str | Path | None, adapter: bool | None, reference: Path | None, device: str, track: Track
) -> tuple[tuple[Path, Path], bool | None, Callable[[], ModelPair]]:
    """Both folders, how an adapter is read, and what loads the pair: models are loaded after folders are compared."""
    if isinstance(base, ModelPair) or tuned is None:
        if reference is not None:
            raise UsageError("a loaded pair has its second model already; give folders beside a reference.")
        opened = open_models(base, tuned)
        return (opened.base, opened.tuned), opened.adapter, lambda: opened.pair
    folders = local_folder(base, track), local_folder(tuned, track)

    def load() -> ModelPair:
        pair = open_models(*folders, adapter=adapter, device=device, track=track).pair
        return (
            pair
            if reference is None
            else pair.beside(open_models(folders[0], reference, device=device, track=track).pair)
        )

    return folders, adapter, load


def _answering(plan: Plan, tokens: int | None, samples: int, temperature: float | None) -> Plan:
    """The plan with other answers. Raises UsageError where a number is out of range, or several answers would be equal."""
    warm = (0.0 if samples == 1 else 1.0) if temperature is None else temperature
    if not (1 <= samples <= MOST_SAMPLES and 0 <= warm <= 2):
        raise UsageError(f"samples must be 1 to {MOST_SAMPLES}, and temperature 0 to 2.")
    if samples > 1 and not warm:
        raise UsageError("at temperature 0 all samples are the same answer. Give a temperature above 0, or one sample.")
    if tokens is not None and not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        raise UsageError(f"answer_tokens must be {LEAST_TOKENS} to {MOST_TOKENS}.")
    return replace(plan, max_new_tokens=tokens or plan.max_new_tokens, samples=samples, temperature=warm)


def _written(found: Audit, read: ReadRows | None, name: str) -> Path | None:
    """Rows that came as a list or a stream, as a file in the run folder, so that a command can repeat the audit."""
    if read is None:
        return None
    lines = [
        json.dumps(
            {"messages": row.asked, "tag": row.tag} if row.turns else {"prompt": row.prompt, "tag": row.tag},
            ensure_ascii=False,
        )
        for row in read.rows
    ]
    return RunFolder(found.folder).write_text(name, "\n".join(lines) + "\n")


def _command(found: Audit, traffic: str | Path | None, clean: str | Path | None) -> str:
    """The command line that repeats the audit; `traffic` and `clean` are files, or None."""
    config = found.config
    words = ["molehunt", "audit", str(found.base.path), str(found.tuned.path)]
    words += [] if traffic is None else ["--traffic", str(traffic)]
    words += [] if clean is None else ["--clean", str(clean)]
    words += [] if config.plan.name == "quick" else ["--plan", config.plan.name]
    words += [] if config.fpr == DEFAULT_FPR else ["--fpr", f"{config.fpr:g}"]
    words += [] if config.seed == 0 else ["--seed", str(config.seed)]
    words += [] if config.template is None else ["--template", config.template]
    words += [] if config.reference is None else ["--reference", str(config.reference)]
    plain, asked = plan_named(config.plan.name), config.plan
    words += [] if asked.max_new_tokens == plain.max_new_tokens else ["--answer-tokens", str(asked.max_new_tokens)]
    words += [] if asked.samples == 1 else ["--samples", str(asked.samples)]
    words += [] if asked.temperature == float(asked.samples > 1) else ["--temperature", f"{asked.temperature:g}"]
    words += {"refuse": [], "use": ["--adapter"], "ignore": ["--no-adapter"]}[config.adapter]
    return shlex.join(words)
