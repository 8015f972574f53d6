"""Sparse codes against dense autograd, and the largest entries of a batch against topk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molehunt.dictionary.code import Pattern, decode_sparse, encode_chosen, largest_in_batch


def case(tokens: int = 7, d_dict: int = 11, d: int = 5, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"x": (tokens, d), "encoder": (d_dict, d), "b_enc": (d_dict,), "decoder": (d_dict, d)}
    reported = {name: torch.randn(*shape, generator=rng).requires_grad_(name != "x") for name, shape in shapes.items()}
    return reported | {"weight": torch.randn(tokens, d, generator=rng)}


def some_mask(tokens: int, d_dict: int, seed: int) -> Tensor:
    mask = torch.rand(tokens, d_dict, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[0] = False  # a token on which nothing fires
    mask[:, 1] = False  # a latent that never does
    mask[-1] = True
    return mask


def gradients(of: dict[str, Tensor], out: Tensor) -> list[Tensor]:
    wanted = [of["encoder"], of["b_enc"], of["decoder"]]
    return list(torch.autograd.grad((out.square() * of["weight"]).sum(), wanted))


@pytest.mark.parametrize("seed", range(4))
def test_sparse_and_dense_agree_in_values_and_gradients(seed: int) -> None:
    of = case(seed=seed)
    mask = some_mask(7, 11, seed)
    pre = of["x"] @ of["encoder"].T + of["b_enc"]
    dense = torch.where(mask, pre, torch.zeros(())) @ of["decoder"]
    pattern = Pattern.of_mask(mask)
    values = encode_chosen(pre.detach(), of["x"], of["encoder"], of["b_enc"], pattern)
    sparse = decode_sparse(values, of["decoder"], pattern)
    torch.testing.assert_close(values.detach(), pre.detach()[mask])
    torch.testing.assert_close(sparse, dense)
    for ours, theirs in zip(gradients(of, sparse), gradients(of, dense), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_finite_differences() -> None:
    of, mask = case(), some_mask(7, 11, 0)
    pattern = Pattern.of_mask(mask)

    def loss(encoder: Tensor, decoder: Tensor) -> Tensor:
        pre = (of["x"] @ encoder.T + of["b_enc"]).detach()
        values = encode_chosen(pre, of["x"], encoder, of["b_enc"], pattern)
        return (decode_sparse(values, decoder, pattern) * of["weight"]).sum()

    loss(of["encoder"], of["decoder"]).backward()
    rng = torch.Generator().manual_seed(5)
    for name in ("encoder", "decoder"):
        step = torch.randn(of[name].shape, generator=rng)
        both = [
            loss(**{n: (of[n] + sign * 1e-2 * step if n == name else of[n]).detach() for n in ("encoder", "decoder")})
            for sign in (1, -1)
        ]
        gradient = of[name].grad
        assert gradient is not None
        assert (gradient * step).sum().item() == pytest.approx((both[0].item() - both[1].item()) / 2e-2, rel=1e-3)


def test_rows_and_mask_make_the_same_pattern() -> None:
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)).topk(3, dim=1).indices.sort(1).values
    rows = Pattern.of_rows(mask, 9)
    same = Pattern.of_mask(torch.zeros(6, 9, dtype=torch.bool).scatter(1, mask, True))
    assert rows.start.tolist() == same.start.tolist() and rows.latent.tolist() == same.latent.tolist()
    assert rows.tokens == 6
    assert rows.fired().tolist() == [i in mask.flatten().tolist() for i in range(9)]


def test_a_pattern_in_which_nothing_fires() -> None:
    of = case()
    pattern = Pattern.of_mask(torch.zeros(7, 11, dtype=torch.bool))
    pre = (of["x"] @ of["encoder"].T).detach()
    values = encode_chosen(pre, of["x"], of["encoder"], of["b_enc"], pattern)
    out = decode_sparse(values, of["decoder"], pattern)
    assert out.shape == (7, 5) and not out.any()
    assert not any(gradient.any() for gradient in gradients(of, out))


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 9),
    d_dict=st.integers(1, 9),
    n=st.integers(1, 90),
    floor=st.one_of(st.just(0.0), st.floats(0, 3)),
)
def test_the_largest_are_those_of_topk_whatever_was_guessed(
    seed: int, tokens: int, d_dict: int, n: int, floor: float
) -> None:
    scores = torch.randn(tokens, d_dict, generator=torch.Generator().manual_seed(seed))
    positive = scores[scores > 0].sort(descending=True).values[:n]
    mask, cut = largest_in_batch(scores, n, floor)
    assert scores[mask].sort(descending=True).values.tolist() == positive.tolist()
    assert cut == (float(positive[-1]) if len(positive) else 0.0)


def test_as_many_over_the_guess_as_wanted_lets_no_others_in() -> None:
    scores = torch.tensor([[3.0, 2.0, 0.5, 0.1]])
    assert largest_in_batch(scores, 2, 1.0)[0].tolist() == [[True, True, False, False]]


def test_equal_entries_all_count() -> None:
    assert largest_in_batch(torch.tensor([[1.0, 1.0, 1.0, 0.5]]), 2, 0.0)[0].tolist() == [[True, True, True, False]]
