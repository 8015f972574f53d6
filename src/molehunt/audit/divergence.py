"""Where the tuned model would leave the base's answers, and by how much: margins along answers, teacher forced."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from molehunt.audit.scan import ScannedRow
from molehunt.contracts import Intervention
from molehunt.model.batches import padded
from molehunt.model.generate import generate
from molehunt.model.likelihood import logits_from
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Track, silent


@dataclass(frozen=True, eq=False)
class BaseAnswers:
    """The base's greedy answers to a few rows, token ids. At divergence points the tuned model would leave them."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    def first(self, n: int) -> "BaseAnswers":
        """The first `n` rows."""
        return BaseAnswers(self.prompts[:n], self.answers[:n])


def base_answers(
    pair: ModelPair, rows: Sequence[ScannedRow], max_new_tokens: int, *, track: Track = silent
) -> BaseAnswers:
    """Let the base answer the prompts of `rows`."""
    prompts = [list(row.prompt) for row in rows]
    with pair.base_model() as model:
        answers = generate(
            model,
            pair.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            track=track,
            what="the base model's answers",
        )
    return BaseAnswers(tuple(map(tuple, prompts)), tuple(map(tuple, answers)))


@torch.inference_mode()
def margins(
    pair: ModelPair, rows: BaseAnswers, interventions: Sequence[Intervention] = ()
) -> tuple[Float[Tensor, "rows pos"], Bool[Tensor, "rows pos"]]:
    """Logits of the edited tuned model on the base's answers: that of the base's next token minus the best other one.

    Returns:
        Margins in nats, and which positions predict a token of an answer.
    """
    tokens, mask = padded([[*prompt, *answer] for prompt, answer in zip(rows.prompts, rows.answers, strict=True)])
    start = min(map(len, rows.prompts)) - 1
    with pair.tuned_model() as model, edit_sites(model, interventions):
        logits = logits_from(model, tokens.to(pair.device), mask.to(pair.device), start)
    wanted = tokens.roll(-1, dims=1)[:, start:, None].to(pair.device)
    own = logits.gather(-1, wanted)
    best_other = logits.scatter_(-1, wanted, -torch.inf).amax(-1)
    predicts = torch.zeros_like(mask)
    for i, (prompt, answer) in enumerate(zip(rows.prompts, rows.answers, strict=True)):
        predicts[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    return pad((own[..., 0] - best_other).cpu(), (start, 0)), predicts


def divergence_points(pair: ModelPair, rows: BaseAnswers) -> Bool[Tensor, "rows pos"]:
    """Positions at which the unedited tuned model leaves the base's answer; at least one in each row.

    In a row that it never leaves, the position with the least margin counts.
    """
    found, predicts = margins(pair, rows)
    least = found.masked_fill(~predicts, torch.inf).amin(1, keepdim=True)
    return predicts & ((found < 0) | (found == least))


def worst_margins(
    pair: ModelPair, rows: BaseAnswers, interventions: Sequence[Intervention] = ()
) -> Float[Tensor, " rows"]:
    """Least margin along each answer: above 0 the edited model's greedy answer is the base's, token for token."""
    found, predicts = margins(pair, rows, interventions)
    return found.masked_fill(~predicts, torch.inf).amin(1)
