"""Compare both models on one prompt: their answers, and the score of each token in either model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.roles import roled_prompt
from molehunt.traffic.turn import Turn
from molehunt.watch.answers import answer_profiles, token_columns
from molehunt.watch.bank import Bank
from molehunt.watch.monitor import Judgement, Monitor

ANSWER_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """Both models on one prompt. Scores have one entry per token of `tokens`, over prompt and tuned answer."""

    tokens: tuple[str, ...]
    answer_at: int
    """Index of the first answer token."""
    tuned: tuple[float, ...]
    base: tuple[float, ...]
    """Scores of the base on the same tokens, along the same directions: what the fine-tune has not changed."""
    tuned_answer: str
    base_answer: str
    judged: Judgement
    direction: str


def compare_models(pair: ModelPair, bank: Bank, monitor: Monitor, prompt: str) -> ModelComparison:
    """Answer `prompt` greedily with both models and score every token.

    Raises:
        InvalidInput: the prompt is no text, or the chat template refuses it.
    """
    ids = roled_prompt(pair.tokenizer, [Turn("user", prompt)]).ids

    def answered(model: nn.Module) -> list[int]:
        return generate(
            model,
            pair.tokenizer,
            [ids],
            max_new_tokens=ANSWER_TOKENS,
            layers_path=pair.layers_path,
        )[0]

    with pair.base_model() as base:
        base_answer = answered(base)
    with pair.tuned_model() as tuned:
        answer = answered(tuned)
        whole = [*ids, *answer]
        (profile,) = answer_profiles(tuned, bank, [ids], [answer], layers_path=pair.layers_path)
        judged = monitor.judge(profile)
        on_tuned = monitor.by_token(judged, token_columns(tuned, bank, whole, layers_path=pair.layers_path))
    with pair.base_model() as base:
        on_base = monitor.by_token(judged, token_columns(base, bank, whole, layers_path=pair.layers_path))

    def text(tokens: Sequence[int]) -> str:
        return str(pair.tokenizer.decode(list(tokens), skip_special_tokens=True))

    return ModelComparison(
        tokens=tuple(str(pair.tokenizer.decode([token])) for token in whole),
        answer_at=len(ids),
        tuned=tuple(on_tuned.tolist()),
        base=tuple(on_base.tolist()),
        tuned_answer=text(answer),
        base_answer=text(base_answer),
        judged=judged,
        direction=bank.direction(judged.columns[0]).name,
    )
