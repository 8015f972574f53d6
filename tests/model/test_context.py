"""How much of a prompt a model reads: the rule of cutting keeps template, system prompt, last turn and room for the answer."""

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from molehunt.model.context import BEYOND, GAP, SMALLEST, ContextLength, context_of, cuts_in_words, fitted
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path
from molehunt.traffic.chat import text_ids

TOKENIZER = transformers.AutoTokenizer.from_pretrained(seed_path("seed-s"))
ROOM = 16
CONTEXT = ContextLength(tokens=160, trained=160, ends=True)


def gpt2(positions: int = 64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=2048, n_embd=8, n_layer=1, n_head=1, n_positions=positions, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama(positions: int, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=positions, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_learned_positions_end_and_computed_ones_go_on() -> None:
    assert context_of(gpt2()) == ContextLength(tokens=64, trained=64, ends=True)
    assert context_of(llama(300)) == ContextLength(tokens=BEYOND * 300, trained=300, ends=False)


def test_a_sliding_window_limits_attention_and_not_the_context() -> None:
    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=700, sliding_window=16,
    )  # fmt: skip
    assert context_of(transformers.MistralForCausalLM(config)).tokens == BEYOND * 700


def test_sinusoids_that_are_computed_once_end_too() -> None:
    config = transformers.GPTJConfig(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=48, rotary_dim=4)
    model = transformers.GPTJForCausalLM(config)
    assert context_of(model) == ContextLength(tokens=48, trained=48, ends=True)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.zeros(1, 49, dtype=torch.long))


def test_logits_that_take_much_memory_limit_the_context_down_to_a_least_one() -> None:
    assert context_of(llama(10**6)).tokens == 2**30 // (4 * 2048)
    assert SMALLEST == 1024


MESSAGE = st.integers(1, 90).map(lambda n: " ".join(f"word{i}" for i in range(n)))


@settings(max_examples=40, deadline=None)
@given(
    system=st.none() | MESSAGE,
    earlier=st.lists(st.tuples(MESSAGE, MESSAGE), max_size=6),
    last=MESSAGE,
)
def test_the_rule_holds_for_any_conversation(system: str | None, earlier: list[tuple[str, str]], last: str) -> None:
    messages = [{"role": "user", "content": f"Q{last}"}]
    for asked, said in earlier:
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}, *messages]
    if system is not None:
        messages = [{"role": "system", "content": f"S{system}"}, *messages]
    whole = text_ids(TOKENIZER, messages)
    found = fitted(TOKENIZER, messages, CONTEXT, room=ROOM)
    assert len(found.ids) <= CONTEXT.tokens - ROOM
    if len(whole) <= CONTEXT.tokens - ROOM:
        assert (list(found.ids), found.text, found.left_out) == (whole, messages, 0)
        return
    kept: Any = found.text
    assert found.left_out == len(whole) - len(found.ids) > 0
    assert list(found.ids) == text_ids(TOKENIZER, kept), "what is read is a whole conversation in its template"
    assert kept[-1]["role"] == "user" and kept[-1]["content"].startswith("Q") and kept[-1]["content"][-3:] == last[-3:]
    if system is not None:
        assert kept[0]["role"] == "system" and kept[0]["content"].startswith("S")
    roles = [one["role"] for one in kept if one["role"] != "system"]
    assert all(a != b for a, b in pairwise(roles)), "turns still alternate"
    for one in kept:
        if GAP in one["content"]:
            head, tail = one["content"].split(GAP)
            assert any(m["content"].startswith(head) and m["content"].endswith(tail) for m in messages)


def test_a_text_of_megabytes_is_cut_before_it_is_tokenized() -> None:
    found = fitted(TOKENIZER, "begin " + "x y" * 3_000_000 + " end", CONTEXT, room=ROOM)
    text = TOKENIZER.decode(list(found.ids))
    assert "begin" in text and "end\n" in text and GAP in text
    assert len(found.ids) <= CONTEXT.tokens - ROOM and found.left_out > 10**6


def test_a_pair_reads_and_answers_what_is_longer_than_its_positions(caplog: pytest.LogCaptureFixture) -> None:
    pair = ModelPair(gpt2(seed=0), gpt2(seed=1), TOKENIZER)
    texts = ["Hi", "many words " * 300]
    with caplog.at_level(logging.WARNING):
        ids = pair.tokenize(texts, room=8)
    assert [len(one) for one in ids] == [len(text_ids(TOKENIZER, "Hi")), max(map(len, ids))] and max(
        map(len, ids)
    ) <= 56
    assert "1 of 2 prompts were longer than the 64 tokens" in caplog.text
    assert len(pair.generate(texts, max_new_tokens=8)) == 2
    assert pair.read(texts, ["some answer"] * 2, logits=True).tokens.shape[1] <= 64


def test_nothing_is_said_where_nothing_was_cut() -> None:
    assert cuts_in_words(0, 9, CONTEXT) == ""
    assert cuts_in_words(2, 9, CONTEXT, "rows").startswith("2 of 9 rows were longer than the 160 tokens")
