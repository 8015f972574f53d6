"""Real prompts without a data set: an instruct model writes what its users might ask, and answers it itself.

Given the template up to the place of the user's text, a chat model goes on with a prompt of the kind that it was trained on
(Magpie, arXiv 2406.08464).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable
from molehunt.model.generate import generate
from molehunt.model.loading import load_model
from molehunt.model.sampling import Sampler, Sampling
from molehunt.model.tokenizers import load_tokenizer
from molehunt.run.progress import Track, counting, silent
from molehunt.traffic.chat import default_template, rendered, text_ids
from molehunt.traffic.example import Example

DRAWING = Sampling(temperature=1.0, top_k=50)
"""Among few tokens, which keeps a small model from writing noise."""
LONGEST_PROMPT = 40
"""Tokens of a prompt: one that does not end by then is left out."""
SHORTEST = 12
"""Number of characters under which a prompt asks nothing."""
AT_ONCE = 128
"""Number of prompts that are drawn between two looks at how many are usable."""
MOST_DRAWS = 8
"""Draws for each prompt that is wanted, after which the model counts as unable to write any."""
MARK = "\N{SNOWMAN}\N{COMET}"
"""Stands for the user's text, to find its place in the template; no template holds it."""


def own_tasks(base: Path, n: int, answer_tokens: int, *, seed: int, track: Track = silent) -> list[Example]:
    """Prompts that an instruct model writes, each with the model's own greedy answer, which may be cut.

    Args:
        base: folder of the model.
        n: number of different prompts.
        answer_tokens: greatest number of tokens of an answer.
        seed: seed of the draws.
        track: shows prompts, then answers.

    Raises:
        NotTestable: the model has no chat template, or writes too few prompts that end.
    """
    tokenizer = load_tokenizer(base)
    model = load_model(base, torch.device("cpu"), torch.bfloat16)
    prompts = own_prompts(model, tokenizer, n, seed=seed, track=track)
    ids = [text_ids(tokenizer, one) for one in prompts]
    answers = generate(
        model, tokenizer, ids, max_new_tokens=answer_tokens, track=track, what="the base model's answers to them"
    )
    return [
        Example(prompt=prompt, response=str(tokenizer.decode(answer, skip_special_tokens=True)))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def own_prompts(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, n: int, *, seed: int, track: Track = silent
) -> list[str]:
    """`n` different prompts that a chat model draws for itself. Raises as `own_tasks`."""
    opening = user_opening(tokenizer)
    found: dict[str, None] = {}
    with counting(track, "the model writes prompts", n) as done:
        for start in range(0, MOST_DRAWS * n, AT_ONCE):
            drawn = _drawn(model, tokenizer, opening, range(start, start + AT_ONCE), seed)
            new = [one for one in dict.fromkeys(drawn) if one not in found][: n - len(found)]
            found.update(dict.fromkeys(new))
            done(len(new))
            if len(found) == n:
                return list(found)
    raise NotTestable(
        f"The model wrote {len(found)} prompts of {n} that end within {LONGEST_PROMPT} tokens. Only models that were "
        "trained on whole conversations write prompts; give prompts of your own."
    )


def user_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to the place where the user's text begins. Raises NotTestable without a template."""
    if default_template(tokenizer) is None:
        raise NotTestable(
            "This model has no chat template, so it cannot write what its users ask. Take an instruct model."
        )
    before, _, _ = rendered(tokenizer, MARK).partition(MARK)
    return tokenizer.encode(before, add_special_tokens=False)


def _drawn(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    opening: Sequence[int],
    numbers: range,
    seed: int,
) -> list[str]:
    """The draws of these numbers that end by themselves and ask something, in one line each."""
    samplers = [Sampler(_seeded(seed, number)) for number in numbers]
    drawn = generate(model, tokenizer, [opening] * len(samplers), max_new_tokens=LONGEST_PROMPT, samplers=samplers)
    ended = [ids for ids in drawn if len(ids) < LONGEST_PROMPT]
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in ended]
    return [text for text in texts if len(text) >= SHORTEST and text.isprintable()]


def _seeded(seed: int, number: int) -> Sampling:
    return replace(DRAWING, seed=seed * 1_000_003 + number)
