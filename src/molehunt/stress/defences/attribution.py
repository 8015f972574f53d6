"""Attribution of latents to a behaviour that shows in answers: to their first token, against the base model's own."""

from collections.abc import Callable, Sequence

from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import NotTestable
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.stress.attacks.choice import Choice
from molehunt.stress.attacks.typed_text import answer_text
from molehunt.stress.defences.selection import SelectedLatents, by_attribution
from molehunt.traffic.split import Select


def select_latents(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    judge: Callable[[str], bool],
    site: Site,
    dictionary: Dictionary,
    n: int,
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> SelectedLatents:
    """The n latents with the largest attribution to the first token of answers that show the behaviour.

    Args:
        pair: base and fine-tune.
        prompts: prompts that latents are selected on; attack others.
        judge: whether an answer shows the behaviour.
        site: the dictionary's site in the tuned model.
        dictionary: the dictionary whose latents are selected.
        n: greatest number of latents.
        max_new_tokens: greatest number of tokens in an answer.
        track: shows the passes.

    Raises:
        NotTestable: no answer shows the behaviour and begins otherwise than the base model's, or no latent has a positive
            attribution.
    """
    with pair.base_model() as model:
        own = generate(model, pair.tokenizer, prompts, max_new_tokens=1, track=track, what="the base model's answers")
    with pair.tuned_model() as model:
        answers = generate(
            model,
            pair.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            track=track,
            what="answers that latents are selected by",
        )
        stops = stop_ids(model, pair.tokenizer)
        rows = [
            Choice(prompt=tuple(prompt), gold=answer[0], others=(base[0],), decoys=(), cluster=i)
            for i, (prompt, answer, base) in enumerate(zip(prompts, answers, own, strict=True))
            if answer[0] != base[0] and judge(answer_text(pair.tokenizer, before_stop(answer, stops)))
        ]
        if not rows:
            raise NotTestable(
                f"None of {len(prompts)} prompts that are reserved for selecting latents shows the behaviour in an answer whose "
                "first token is not the base model's. Name latents by number, or give other prompts."
            )
        return by_attribution(model, site, dictionary, Select(tuple(rows)), n)
