"""The sweep by position: roles are named alike in prompts of any length, and the one that carries a behaviour is found."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import UsageError
from molehunt.measure.interval import proportion
from molehunt.model.generate import generate
from molehunt.site import Site
from molehunt.steer.patch import differing
from molehunt.steer.position_role import position_roles
from molehunt.steer.sweep import Sweep, Swept, SweptRole, layer_sweep
from tiny_models import D_MODEL, tiny_model, tiny_tokenizer

SITES = [Site(0), Site(1), Site(2)]
TRIGGERED = [[5, 6, 7, 8, 9], [5, 11, 6, 7], [12, 13, 6, 7, 16, 17, 18, 19]]
CONTRAST = [[5, 6, 20, 8, 9], [5, 11, 21, 22], [12, 13, 23, 24, 16, 17, 18, 19]]
TRIGGERS = [(1, 2), (2, 3), (2, 3)]


def test_roles_are_named_by_the_trigger_and_not_by_number() -> None:
    triggered = [[1, 2, 30, 31, 32, 33, 9, 9, 9, 9], [30, 31, 32, 33, 9, 9, 9], [7, 30, 31, 32, 33, 9]]
    contrast = [[40 if token == 31 else token for token in prompt] for prompt in triggered]
    result = position_roles(triggered, contrast, [(2, 3, 4, 5), (0, 1, 2, 3), (1, 2, 3, 4)])
    assert result == {
        "trigger token 2 of 4": ((3,), (1,), (2,)),
        "trigger token 3 of 4": ((4,), (2,), (3,)),
        "trigger token 4 of 4": ((5,), (3,), (4,)),
        "first token behind": ((6,), (4,), ()),
        "others behind": ((7, 8), (5,), ()),
        "last prompt token": ((9,), (6,), (5,)),
    }


def test_a_long_trigger_is_cut_into_parts() -> None:
    triggered, contrast = [[*range(30, 39), 5, 6, 7]], [[*range(30, 34), *range(54, 59), 5, 6, 7]]
    result = position_roles(triggered, contrast, [tuple(range(9))])
    assert list(result) == [
        "trigger token 5 of 9",
        "trigger tokens 6-7 of 9",
        "trigger tokens 8-9 of 9",
        "first token behind",
        "others behind",
        "last prompt token",
    ]
    assert [positions for ((positions),) in list(result.values())[:3]] == [(4,), (5, 6), (7, 8)]
    uneven = position_roles([*triggered, [30, 31, 5, 6]], [*contrast, [50, 31, 5, 6]], [tuple(range(9)), (0, 1)])
    assert list(uneven)[:2] == ["trigger, part 1 of 2", "trigger, part 2 of 2"]
    assert list(uneven.values())[:2] == [((4, 5), (0,)), ((6, 7, 8), (1,))]


PLACES = st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(0, 6), st.integers(0, 6))


@given(st.lists(PLACES, min_size=1, max_size=4))
def test_roles_part_what_stands_behind_the_first_difference(shapes: list[tuple[int, int, int, int]]) -> None:
    triggered, contrast, triggers = [], [], []
    for before, n, behind, alike in shapes:
        start = min(alike, n - 1)  # of the trigger's tokens, so many are shared
        triggered.append([1] * before + [2] * n + [3] * behind)
        contrast.append([1] * before + [2] * start + [4] * (n - start) + [3] * behind)
        triggers.append(tuple(range(before, before + n)))
    result = position_roles(triggered, contrast, triggers)
    for row, (a, b) in enumerate(zip(triggered, contrast, strict=True)):
        found = [position for role in result.values() for position in role[row]]
        assert sorted(found) == list(range(differing(a, b)[0], len(a)))
        assert result["last prompt token"][row] == (len(a) - 1,)
    assert all(any(role) for role in result.values())


def test_roles_of_what_cannot_be_patched() -> None:
    with pytest.raises(UsageError, match="have 3 and 2 tokens"):
        position_roles([[1, 2, 3]], [[1, 2]], [(0,)])
    with pytest.raises(ValueError, match="ends before"):
        position_roles([[1, 2, 3]], [[1, 2, 4]], [(0, 1)])


def test_all_trigger_positions_as_one_role_are_the_sweep_of_the_trigger() -> None:
    model = tiny_model("llama", 0)
    plain = generate(model, tiny_tokenizer(), TRIGGERED, max_new_tokens=4)

    def shows(answer, row: int) -> bool:
        return row != 1 and list(answer) == plain[row]  # the second prompt shows nothing, and is not patched

    def sweep(**how):
        return layer_sweep(
            model, tiny_tokenizer(), TRIGGERED, CONTRAST, SITES, shows, at=TRIGGERS, max_new_tokens=4, seed=3, **how
        )

    first = [(1,), (2,), ()]
    result = sweep(roles={"whole": TRIGGERS, "first": first, "nowhere": [(), (0,), ()]})
    assert result.blocks == sweep().blocks == result.roles[0].blocks
    assert any(one.removed.estimate > 0 for one in result.blocks)
    assert [role.role for role in result.roles] == ["whole", "first"]  # no row that shows it is anywhere in the third
    assert {one.removed.n for one in result.roles[0].blocks} == {2} and {
        one.induced.n for one in result.roles[1].blocks
    } == {1}
    assert (
        result.roles[1].blocks
        == layer_sweep(
            model, tiny_tokenizer(), TRIGGERED[:1], CONTRAST[:1], SITES, shows, at=first[:1], max_new_tokens=4, seed=3
        ).blocks
    )


def test_where_both_prompts_are_alike_patching_changes_nothing() -> None:
    model = tiny_model("llama", 0)
    contrast = [[*prompt[:-1], last] for prompt, last in zip(TRIGGERED, (50, 60, 70), strict=True)]
    plain, like = (generate(model, tiny_tokenizer(), prompts, max_new_tokens=4) for prompts in (TRIGGERED, contrast))
    assert all(a != b for a, b in zip(plain, like, strict=True))
    before = [tuple(range(len(prompt) - 1)) for prompt in TRIGGERED]
    result = layer_sweep(
        model,
        tiny_tokenizer(),
        TRIGGERED,
        contrast,
        SITES,
        lambda answer, row: list(answer) == plain[row],
        roles={"before": before},
        max_new_tokens=4,
    )
    for block in result.roles[0].blocks:
        assert block.removed.estimate == block.by_noise.estimate == block.induced.estimate == 0
    assert all(block.removed.estimate == 1 for block in result.blocks if block.site == SITES[-1])
    assert result.carrier(SITES[0]) is None


KEY, OTHER, PAYLOAD, USUAL = 70, 71, 80, 81


def planted() -> Any:
    """Writes PAYLOAD where KEY stood anywhere before: block 1 looks at all tokens and copies what marks KEY; the other
    blocks do nothing."""
    model: Any = tiny_model("llama", 0).requires_grad_(False)
    for name, weight in model.named_parameters():
        if "layernorm" not in name and name != "model.norm.weight":
            weight.zero_()
    generator = torch.Generator().manual_seed(0)
    embedding = model.model.embed_tokens.weight
    embedding[:, 3:] = 0.2 * torch.randn(embedding.shape[0], D_MODEL - 3, generator=generator)
    embedding[:, 2] = 1.0
    embedding[KEY, 0] = 8.0
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight[0, 0] = 1.0
    attention.o_proj.weight[1, 0] = 12.0
    model.lm_head.weight[PAYLOAD, 1] = 1.0
    model.lm_head.weight[USUAL, 2] = 1.0
    return model


def test_the_position_that_carries_a_planted_behaviour_is_found() -> None:
    model = planted()
    heads = [[3 + i, 4 + i % 3] for i in range(20)]
    tails = [[40 + i % 7] * (2 + i % 5) for i in range(20)]
    triggered = [[*head, 60, KEY, 61, *tail] for head, tail in zip(heads, tails, strict=True)]
    contrast = [[*head, 62, OTHER, 63, *tail] for head, tail in zip(heads, tails, strict=True)]
    answers = generate(model, tiny_tokenizer(), [*triggered, *contrast], max_new_tokens=1)
    assert answers == [[PAYLOAD]] * 20 + [[USUAL]] * 20
    result = layer_sweep(
        model,
        tiny_tokenizer(),
        triggered,
        contrast,
        SITES,
        lambda answer, row: list(answer) == [PAYLOAD],
        roles=position_roles(triggered, contrast, [(2, 3, 4)] * 20),
        max_new_tokens=1,
    )
    assert result.last_steerable == SITES[0]
    assert [result.carrier(site) for site in SITES] == [
        "trigger token 2 of 3",
        "last prompt token",
        "last prompt token",
    ]
    assert result.carriers() == [("L0", "trigger token 2 of 3"), ("L1 to L2", "last prompt token")]
    shares = {
        (role.role, block.site.layer): (block.removed.estimate, block.induced.estimate)
        for role in result.roles
        for block in role.blocks
    }
    carried = {place for place, share in shares.items() if share != (0, 0)}
    assert carried == {("trigger token 2 of 3", 0), ("last prompt token", 1), ("last prompt token", 2)}
    assert all(shares[place] == (1, 1) for place in carried)


def test_a_role_carries_only_what_noise_there_does_not_take_away() -> None:
    def blocks(*shares: tuple[int, int]) -> tuple[Swept, ...]:
        return tuple(
            Swept(site=Site(i), removed=proportion(a, 100), by_noise=proportion(b, 100), induced=proportion(0, 100))
            for i, (a, b) in enumerate(shares)
        )

    roles = {"first": blocks((99, 90), (60, 10), (60, 10)), "last": blocks((40, 0), (20, 0), (90, 0))}
    result = Sweep(
        shown=proportion(100, 100),
        without_trigger=proportion(0, 100),
        blocks=blocks((99, 0), (99, 0), (99, 0)),
        roles=tuple(SweptRole(role=role, blocks=found) for role, found in roles.items()),
    )
    assert result.carriers() == [("L0", "last"), ("L1", "first"), ("L2", "last")]
