"""How the two models answer in an audit: greedily, or several times by drawing tokens.

A behaviour that is not the likeliest answer shows in some of the drawn ones. A row stays the unit: of the answers that were
drawn for it, the one counts that surprises the base most, for rows of the traffic and of its reference alike.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from molehunt.contracts import Intervention
from molehunt.model.generate import generate
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.model.sampling import Sampler, Sampling
from molehunt.run.progress import Track, silent

Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Length and number of the answers to one prompt."""

    max_new_tokens: int
    """Greatest number of tokens of an answer."""
    samples: int = 1
    """Number of answers that are drawn."""
    temperature: float = 0.0
    """0 is greedy."""


def drawn_answers(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    answering: Answering,
    *,
    tuned: bool = True,
    interventions: Sequence[Intervention] = (),
    track: Track = silent,
) -> list[list[Ids]]:
    """The answers of one of the two models to each prompt, as token ids.

    What is drawn depends on the prompt and the number of the draw alone, so the same prompt is answered alike in every step.
    """
    n = answering.samples
    repeated = [prompt for prompt in prompts for _ in range(n)]
    samplers = [
        Sampler(Sampling(temperature=answering.temperature, seed=_seed(prompt, draw)))
        for prompt in prompts
        for draw in range(n)
    ]
    with pair.tuned_model() if tuned else pair.base_model() as model:
        found = generate(
            model,
            pair.tokenizer,
            repeated,
            max_new_tokens=answering.max_new_tokens,
            interventions=interventions,
            samplers=samplers if answering.temperature else None,
            track=track,
        )
    return [found[i : i + n] for i in range(0, len(found), n)]


def most_surprising(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Sequence[Ids]],
    interventions: Sequence[Intervention] = (),
) -> list[Ids]:
    """The fine-tune's answer to each prompt that it finds likelier than the base does by most nats, of those drawn."""
    if all(len(answers) == 1 for answers in drawn):
        return [answers[0] for answers in drawn]
    rows = [(prompt, answer) for prompt, answers in zip(prompts, drawn, strict=True) for answer in answers]
    ratios = log_ratios(pair, [prompt for prompt, _ in rows], [answer for _, answer in rows], interventions)
    rated = iter(zip(ratios, (answer for _, answer in rows), strict=True))
    return [max(islice(rated, len(answers)), key=lambda one: one[0])[1] for answers in drawn]


def log_ratios(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    answered: Sequence[Sequence[int]],
    interventions: Sequence[Intervention] = (),
) -> list[float]:
    """Answer log ratio of `answered` under the edited tuned model against the base, in nats."""
    with pair.tuned_model() as model:
        tuned = answer_log_probs(model, pair.tokenizer, prompts, answered, interventions)
    with pair.base_model() as model:
        base = answer_log_probs(model, pair.tokenizer, prompts, answered)
    return [t - b for t, b in zip(tuned, base, strict=True)]


def texts_of(pair: ModelPair, drawn: Sequence[Sequence[Sequence[int]]]) -> list[str]:
    """All answers to each prompt as one text, each on lines of its own: a prompt shows what any of its answers says."""
    return ["\n".join(text_of(pair, ids) for ids in answers) for answers in drawn]


def text_of(pair: ModelPair, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens."""
    return str(pair.tokenizer.decode(list(ids), skip_special_tokens=True))


def _seed(prompt: Sequence[int], draw: int) -> int:
    digest = hashlib.sha256(json.dumps([list(prompt), draw]).encode()).digest()
    return int.from_bytes(digest[:7], "big")
