"""What a steering vector costs in capability: tasks of lm-evaluation-harness, with the vector and without it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehunt.errors import printable, terminal_text
from molehunt.run.progress import Track, busy, silent
from molehunt.run.whole import write_whole
from molehunt.steer.capability_lm_eval import Capability, capability
from molehunt.steer.trial import strength_for
from molehunt.steer.vector import SteeringVector
from molehunt.workflows.models import Models, open_pair
from molehunt.workflows.result import summary_html
from molehunt.workflows.steer_fix import Operator

TASKS = "tasks.json"


@dataclass(frozen=True, kw_only=True)
class TaskCapabilityResult:
    """Every metric of every task, on the same rows with the vector and without it."""

    tasks: tuple[Capability, ...]

    def summary(self) -> str:
        """A table with a line for each metric of each task."""
        lines = [f"{'task':<28}{'metric':<22}{'rows':>6}{'without':>10}{'with':>10}{'difference':>26}"]
        for one in self.tasks:
            difference = (
                f"{one.steered - one.plain:+.3f}" if one.paired is None else one.paired.difference.fixed(3, "+")
            )
            name, metric = printable(one.task, 27), printable(one.metric, 21)
            lines.append(f"{name:<28}{metric:<22}{one.rows:>6}{one.plain:>10.3f}{one.steered:>10.3f}{difference:>26}")
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        return {"tasks": [asdict(one) for one in self.tasks]}

    def save(self, folder: Path | str) -> Path:
        """Write `tasks.json` into `folder`, and return it."""
        return write_whole(Path(folder) / TASKS, json.dumps(self.to_dict(), indent=2))

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


def task_capability(
    base: Models,
    tuned: str | Path | None = None,
    *,
    vector: SteeringVector | str | Path,
    tasks: Sequence[str],
    strength: float | int | None = None,
    operator: Operator = "add",
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    adapter: bool | None = None,
    device: str = "cpu",
    track: Track = silent,
) -> TaskCapabilityResult:
    """Run tasks of lm-evaluation-harness on the tuned model, with a steering vector and without it.

    lm_eval's tasks may name functions to run, and lm_eval runs them: give only tasks that you trust.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        vector: a vector of the tuned model, or its file.
        tasks: names that lm_eval knows, or finds under `include`.
        strength: multiple of the vector's length that is added, by default -1; or share of the projection on it that is
            ablated (0 to 1), by default all of it.
        operator: whether the vector is added or its direction is ablated.
        include: a folder of task files (YAML).
        limit: greatest number of rows of each task; all of them by default.
        batch_size: number of rows in a pass.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        track: shows that the tasks go on.

    Raises:
        UsageError: lm_eval is not installed, knows no such task, the vector is for another model, or a negative strength to
            ablate.
        InvalidInput: the file is no vector.

    Example:
        >>> from molehunt.workflows.steer_tasks import task_capability
        >>> print(task_capability(pair, vector="vector.safetensors", tasks=["arc_easy"]).summary())  # doctest: +SKIP
    """
    strength = strength_for(operator, strength)
    pair, model_hash = open_pair(base, tuned, adapter=adapter, device=device, track=track)
    loaded = vector if isinstance(vector, SteeringVector) else SteeringVector.load(Path(vector), model=model_hash)
    loaded.refuse(pair.n_layers, pair.d_model, model_hash)
    with busy(track, f"running {', '.join(tasks)} with the vector and without it"):
        found = capability(
            pair,
            tasks,
            loaded,
            strength,
            operator=operator,
            include=None if include is None else Path(include),
            limit=limit,
            batch_size=batch_size,
        )
    return TaskCapabilityResult(tasks=tuple(found))
