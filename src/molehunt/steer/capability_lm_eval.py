"""What steering costs in capability: tasks of lm-evaluation-harness on the tuned model, with a vector and without it.

lm_eval's tasks may name functions to run, and are run as lm_eval runs them: give only tasks that you trust.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehunt.errors import UsageError, printable
from molehunt.measure.equivalence import Equivalence, paired_equivalence
from molehunt.model.blocks import unwrapped
from molehunt.model.pair import ModelPair
from molehunt.run.extras import install_command
from molehunt.steer.vector import Operator, Ranges, SteeringVector


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One metric of one task, on the same rows twice."""

    task: str
    metric: str
    """The metric's name in lm_eval, such as `acc,none` (metric, filter)."""
    rows: int
    plain: float
    steered: float
    stderr: tuple[float, float] | None
    """lm_eval's standard errors of the two numbers, where it has any."""
    paired: Equivalence | None
    """Paired comparison of steered and plain, where each row is right or wrong."""


def capability(
    pair: ModelPair,
    tasks: Sequence[str],
    vector: SteeringVector,
    strength: float | int = 1.0,
    *,
    operator: Operator = "add",
    ranges: Ranges | None = None,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[Capability]:
    """Run tasks on a pair's tuned model, plain and steered.

    Args:
        pair: its tuned model and tokenizer are used.
        tasks: names that lm_eval knows, or finds under `include`.
        vector: a vector of the tuned model.
        strength: multiple of the vector's length.
        operator: see `SteeringVector.interventions`.
        ranges: ranges for `clip`.
        include: a folder of task files (YAML).
        limit: greatest number of rows of each task; all of them by default.
        batch_size: number of rows in a pass.

    Raises:
        UsageError: lm_eval is not installed, knows no such task, or the vector is for another model.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(f"capability tasks need an extra: {install_command('exports')}") from None
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm_eval knows no task {printable(unknown[0])}; name a folder of task files that has it.")

    with pair.tuned_model() as model:

        def run() -> dict[str, Any]:
            lm = HFLM(pretrained=unwrapped(model), tokenizer=pair.tokenizer, batch_size=batch_size)
            return simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, limit=limit)

        plain = run()
        with vector.applied(model, strength, operator=operator, ranges=ranges, layers_path=pair.layers_path):
            steered = run()
    return [_compared(task, metric, plain, steered) for task in plain["samples"] for metric in _metrics(plain, task)]


def _metrics(results: dict[str, Any], task: str) -> list[str]:
    return [name for name, value in results["results"][task].items() if "," in name and isinstance(value, int | float)
            and not name.partition(",")[0].endswith("_stderr")]  # fmt: skip


def _compared(task: str, metric: str, plain: dict[str, Any], steered: dict[str, Any]) -> Capability:
    name, _, filtered = metric.partition(",")
    values = [
        [row[name] for row in sorted(run["samples"][task], key=lambda row: row["doc_id"]) if row["filter"] == filtered]
        for run in (plain, steered)
    ]
    before, after = ([float(v) for v in rows if isinstance(v, int | float)] for rows in values)
    judged = len(before) == len(values[0]) > 0 and {*before, *after} <= {0.0, 1.0}
    errors = [run["results"][task].get(f"{name}_stderr,{filtered}") for run in (plain, steered)]
    return Capability(
        task=task,
        metric=metric,
        rows=len(values[0]),
        plain=float(plain["results"][task][metric]),
        steered=float(steered["results"][task][metric]),
        stderr=(float(errors[0]), float(errors[1])) if all(isinstance(e, int | float) for e in errors) else None,
        paired=paired_equivalence([v == 1 for v in after], [v == 1 for v in before]) if judged else None,
    )
