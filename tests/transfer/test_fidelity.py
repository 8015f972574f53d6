"""Teacher-forced fidelity against a pass of each text by itself with the activations put in by hand."""

import copy

import pytest
import torch

from molehunt.activation.scale import sinks
from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.fidelity import Forced, ablation_at, compared, forced_kl, teacher_forced
from molehunt.transfer.linear_map import LinearMap
from tiny_models import D_MODEL, VOCAB, hooks, tiny_model

SOURCE_SITE, SITE = Site(0), Site(1)


def rows(n: int = 7) -> list[Aligned]:
    """Texts of other lengths in either model; every second target token has a partner."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for k in range(n):
        source = torch.randint(3, VOCAB, (6 + k,), generator=rng).tolist()
        target = [token for token in source for _ in range(2)][: 2 * len(source) - k % 2]
        pairs = tuple((i, 2 * i + 1) for i in range(1, len(source)) if 2 * i + 1 < len(target))
        made.append(Aligned(source=tuple(source), target=tuple(target), pairs=pairs))
    return made


def random_map(seed: int = 0, source: Site = SOURCE_SITE, target: Site = SITE) -> LinearMap:
    rng = torch.Generator().manual_seed(seed)
    return LinearMap(
        source, target, torch.randn(D_MODEL, D_MODEL, generator=rng) / 5, torch.randn(D_MODEL, generator=rng)
    )


IDENTITY = LinearMap(SITE, SITE, torch.eye(D_MODEL), torch.zeros(D_MODEL))


def block(model, layer: int, ids, edit=None):
    """Output of one block, and logits; `edit` may change the output in place."""
    kept = {}

    def hook(module, args, output):
        out = output[0] if isinstance(output, tuple) else output
        if edit is not None:
            edit(out[0])
        kept["acts"] = out[0].clone()

    handle = model.model.layers[layer].register_forward_hook(hook)
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)])).logits[0]
    handle.remove()
    return kept["acts"], logits.double().log_softmax(-1)


def by_hand(source, target, row: Aligned, map: LinearMap | None) -> list[float]:
    """Tokens, KL, agreed, CE, own CE of one text; mean ablation without a map."""
    x, _ = block(source, 0, row.source)
    y, own = block(target, SITE.layer, row.target)
    real = torch.ones(1, 99, dtype=torch.bool)
    x_sink, y_sink = sinks(x[None], real[:, : len(x)])[0], sinks(y[None], real[:, : len(y)])[0]
    places = [(i, j) for i, j in row.pairs if not x_sink[i] and not y_sink[j]]
    mean = torch.stack([y[j] for _, j in places]).mean(0)

    def edit(out) -> None:
        for i, j in places:
            out[j] = mean if map is None else map(x[i][None])[0]

    _, replaced = block(target, SITE.layer, row.target, edit)
    tokens = kl = agreed = ce = ce_own = 0.0
    for _, j in places:
        if j + 1 < len(row.target):
            following = row.target[j + 1]
            tokens += 1
            kl += float((own[j].exp() * (own[j] - replaced[j])).sum())
            agreed += float(own[j].argmax() == replaced[j].argmax())
            ce -= float(replaced[j, following])
            ce_own -= float(own[j, following])
    return [tokens, kl, agreed, ce, ce_own]


def test_each_text_has_what_it_has_alone_whatever_its_batch() -> None:
    source, target, some = tiny_model("llama", 0), tiny_model("llama", 1), rows()
    maps = {"one": random_map(0), "other": random_map(1)}
    found = teacher_forced(source, target, some, maps)
    assert list(found) == [ablation_at(SITE), "one", "other"]
    for name, map in ((ablation_at(SITE), None), *maps.items()):
        got = found[name]
        for i, row in enumerate(some):
            expected = by_hand(source, target, row, map)
            sums = [float(t[i]) for t in (got.tokens, got.kl, got.agreed, got.ce, got.ce_own)]
            assert sums == pytest.approx(expected, rel=1e-3, abs=1e-3)
            assert float(got.ce_ablated[i]) == pytest.approx(float(found[ablation_at(SITE)].ce[i]))
    assert hooks(source) == hooks(target) == 0


def test_maps_between_several_sites_are_each_what_they_are_alone() -> None:
    source, target, some = tiny_model("llama", 0), tiny_model("gpt2", 1), rows()
    maps = {"a": random_map(0, Site(0), Site(0)), "b": random_map(1, Site(2), Site(2, "mlp"))}
    both = teacher_forced(source, target, some, maps)
    assert list(both) == [ablation_at(Site(0)), ablation_at(Site(2, "mlp")), "a", "b"]
    for name, map in maps.items():
        alone = teacher_forced(source, target, some, {name: map})[name]
        for field in ("kl", "ce", "ce_ablated"):
            torch.testing.assert_close(getattr(both[name], field), getattr(alone, field), rtol=1e-4, atol=1e-4)


def test_a_model_that_is_its_own_source_loses_nothing() -> None:
    target = tiny_model("llama")
    same = [Aligned(source=r.target, target=r.target, pairs=tuple((j, j) for _, j in r.pairs)) for r in rows()]
    found = teacher_forced(copy.deepcopy(target), target, same, {"identity": IDENTITY})
    kept, lost = found["identity"], found[ablation_at(SITE)]
    assert kept.kl_per_token().estimate == pytest.approx(0, abs=1e-5)
    assert kept.agreement().estimate == 1 and kept.ce_recovered().estimate == pytest.approx(1, abs=1e-4)
    assert lost.kl_per_token().estimate > 0.1 and lost.ce_recovered().estimate == 0
    assert 0 <= lost.agreement().estimate < 1


def forced(kl: list[float], tokens: list[float]) -> Forced:
    t, zeros = torch.tensor(tokens, dtype=torch.float64), torch.zeros(len(kl), dtype=torch.float64)
    return Forced(tokens=t, kl=torch.tensor(kl).double(), agreed=t / 2, ce=2 * t, ce_own=t, ce_ablated=zeros + 5 * t)


def test_shares_are_of_all_tokens_and_a_difference_is_paired_by_text() -> None:
    texts = 40
    lengths = [float(5 + i % 7) for i in range(texts)]
    hard = [10.0 * (i % 5) for i in range(texts)]  # some texts are hard for both
    worse = [k + 0.5 * n + 0.01 * i for i, (k, n) in enumerate(zip(hard, lengths, strict=True))]
    a, b = forced(hard, lengths), forced(worse, lengths)
    assert a.kl_per_token().estimate == pytest.approx(sum(hard) / sum(lengths))
    assert a.agreement().estimate == 0.5 and a.ce_recovered().estimate == pytest.approx(0.75)
    assert a.ce_below(b).estimate == 0 and b.kl_below(a).estimate == -a.kl_below(b).estimate
    gain = a.kl_below(b)
    assert gain.estimate == pytest.approx((sum(worse) - sum(hard)) / sum(lengths)) and gain.low > 0.4
    assert a.kl_per_token().high > b.kl_per_token().low, "unpaired, the same texts would not tell them apart"
    with pytest.raises(ValueError, match="the same texts"):
        a.kl_below(forced(hard, lengths[::-1]))


def test_scores_of_answers_are_compared_prompt_by_prompt() -> None:
    ablated = [0.1 * (i % 8) for i in range(50)]
    replaced = [score + 0.05 + 0.002 * (i % 3) for i, score in enumerate(ablated)]
    found = compared(replaced, ablated)
    assert found.replaced.estimate == pytest.approx(sum(replaced) / 50)
    assert found.difference.estimate == pytest.approx(found.replaced.estimate - found.ablated.estimate)
    assert found.difference.low > 0.04 and found.replaced.low < found.ablated.high
    with pytest.raises(ValueError):
        compared(replaced, ablated[:-1])


def test_what_is_watched_in_training_is_the_same_kl() -> None:
    source, target, some = tiny_model("llama", 0), tiny_model("llama", 1), rows()
    expected = teacher_forced(source, target, some, {"map": random_map()})["map"].kl_per_token().estimate
    assert forced_kl(source, target, some)(random_map()) == pytest.approx(expected)


def test_texts_without_a_position_to_replace_are_refused_or_left_out() -> None:
    source, target = tiny_model("llama", 0), tiny_model("llama", 1)
    bare = Aligned(source=(5, 6), target=(5, 6), pairs=())
    last_only = Aligned(source=(5, 6), target=(5, 6), pairs=((1, 1),))
    with pytest.raises(NotTestable, match="no position of 2 texts"):
        teacher_forced(source, target, [bare, last_only], {"map": random_map()})
    some = rows()
    with_bare = teacher_forced(source, target, [bare, *some], {"map": random_map()})["map"]
    torch.testing.assert_close(
        with_bare.kl, teacher_forced(source, target, some, {"map": random_map()})["map"].kl, rtol=1e-4, atol=1e-4
    )
