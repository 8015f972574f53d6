"""Tokens that an intervention is held to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.model.generate import generate
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.scope import last_of_prompt, none_of_it, occurrences, token_scope, whole_prompt
from tiny_models import hooks, tiny_model, tiny_tokenizer

SITE = Site(1)
PUSH = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 8
PROMPTS = [[5, 6, 7, 8, 9], [5, 11, 6, 7], [12, 13, 14, 15, 16, 17, 18, 19]]
SCOPES = {"prompt": whole_prompt, "answer": none_of_it, "last": last_of_prompt, "trigger": occurrences([[6, 7]])}


def by_hand(model, prompt: list[int], name: str, steps: int) -> list[int]:
    """One row at a time, without a cache: the whole text again for every token, edited where the scope says."""
    answer: list[int] = []
    for _ in range(steps):
        ids = torch.tensor([[*prompt, *answer]])
        n = len(prompt)
        at = torch.zeros(1, ids.shape[1], dtype=torch.bool)
        if name == "prompt":
            at[0, :n] = True
        elif name == "last":
            at[0, n - 1] = True
        elif name == "answer":
            at[0, n:] = True
        else:
            for i in range(n - 1):
                if prompt[i : i + 2] == [6, 7]:
                    at[0, i : i + 2] = True

        def edit(module, args, output, at=at):
            acts = output[0] if isinstance(output, tuple) else output
            acts = torch.where(at[..., None], acts + PUSH, acts)
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        handle = model.model.layers[SITE.layer].register_forward_hook(edit)
        with torch.inference_mode():
            answer.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
        handle.remove()
    return answer


@pytest.mark.parametrize("name", SCOPES)
def test_every_scope_is_what_editing_one_row_without_a_cache_is(name: str) -> None:
    model = tiny_model("llama", 0)
    before = hooks(model)
    with token_scope(model, SCOPES[name], generation=name == "answer") as gate:
        edit = Add(SITE, PUSH, 1.0, gate)
        got = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=5, interventions=[edit], stop=[])
    assert hooks(model) == before
    for prompt, answer in zip(PROMPTS, got, strict=True):
        assert answer == by_hand(model, prompt, name, 5)


@given(st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=9), min_size=1, max_size=4), st.booleans())
def test_occurrences_are_found_under_padding_on_either_side(rows: list[list[int]], left: bool) -> None:
    wanted = [4, 5]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 4)  # padding that looks like a trigger's first token
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for r, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[r, at] = torch.tensor(row)
        real[r, at] = True
    found = occurrences([wanted])(ids, real)
    last = last_of_prompt(ids, real)
    for r, row in enumerate(rows):
        expected = [any(row[j : j + 2] == wanted for j in (i, i - 1) if j >= 0) for i in range(len(row))]
        assert found[r, real[r]].tolist() == expected and not found[r, ~real[r]].any()
        assert last[r, real[r]].tolist() == [False] * (len(row) - 1) + [True]


def test_a_trigger_without_tokens_is_refused_and_a_long_one_stands_nowhere() -> None:
    with pytest.raises(ValueError, match="stands nowhere"):
        occurrences([[1], []])
    assert not occurrences([[1, 2, 3]])(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)).any()
