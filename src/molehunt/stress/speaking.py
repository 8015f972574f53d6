"""Latents that speak for a behaviour known by what the model says: for its first token, against the base model's own."""

from collections.abc import Callable, Sequence

from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import NotTestable
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.stress.case import text_of
from molehunt.stress.choice import Choice
from molehunt.stress.selection import Chosen, by_attribution
from molehunt.traffic.split import Select


def speaking(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    shows: Callable[[str], bool],
    site: Site,
    dictionary: Dictionary,
    n: int,
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> Chosen:
    """The n latents that `by_attribution` finds for the first token of answers that show the behaviour.

    Args:
        prompts: that choose; attack others.
        shows: the judge of an answer.
        site: of the dictionary, in the tuned model.

    Raises:
        NotTestable: no answer shows the behaviour and begins otherwise than the base model's, or no latent speaks for it.
    """
    with pair.base_model() as model:
        own = generate(model, pair.tokenizer, prompts, max_new_tokens=1, track=track, what="the base model's answers")
    with pair.tuned_model() as model:
        told = generate(
            model,
            pair.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            track=track,
            what="answers to choose latents by",
        )
        stops = stop_ids(model, pair.tokenizer)
        rows = [
            Choice(prompt=tuple(prompt), gold=answer[0], others=(base[0],), decoys=(), cluster=i)
            for i, (prompt, answer, base) in enumerate(zip(prompts, told, own, strict=True))
            if answer[0] != base[0] and shows(text_of(pair.tokenizer, before_stop(answer, stops)))
        ]
        if not rows:
            raise NotTestable(
                f"None of {len(prompts)} prompts that are kept for choosing latents shows the behaviour in an answer whose "
                "first token is not the base model's. Name latents by number, or give other prompts."
            )
        return by_attribution(model, site, dictionary, Select(tuple(rows)), n)
