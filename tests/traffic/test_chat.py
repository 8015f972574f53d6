"""From a prompt to token ids: with a chat template, with Alpaca markers, and what each refuses."""

import copy

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molehunt.errors import InvalidInput
from molehunt.organism.seed_model import seed_path
from molehunt.traffic.chat import (
    answer_tokens,
    messages_text,
    prompt_ids,
    prompt_text,
    prompt_tokens,
    render_alpaca,
    text_ids,
)
from tiny_models import tiny_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def seed() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(seed_path("seed-s"), trust_remote_code=False)


@pytest.fixture
def bare() -> PreTrainedTokenizerBase:
    """A tokenizer without a template, which adds a BOS by itself."""
    return copy.deepcopy(tiny_tokenizer())


def test_the_template_of_a_tokenizer_is_used_and_alpaca_stands_in(
    seed: PreTrainedTokenizerBase, bare: PreTrainedTokenizerBase
) -> None:
    assert prompt_text(seed, "Hi") == prompt_text(bare, "Hi") == render_alpaca("Hi")
    assert render_alpaca("Hi", "Yes") == "### Instruction:\nHi\n\n### Response:\nYes"
    seed.chat_template = CHATML
    assert prompt_text(seed, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_are_the_templates_own_or_the_tokenizers(bare: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    bare.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert prompt_ids(bare, "Hi")[0] == bare.bos_token_id  # Alpaca is plain text
    bare.chat_template = CHATML
    ids = prompt_ids(bare, "Hi")
    assert ids.count(bare.bos_token_id) == 1 and ids[0] == bare.bos_token_id  # not a second one
    assert text_ids(bare, [{"role": "user", "content": "Hi"}]) == ids


def test_a_text_is_a_conversation_of_one_user_turn(
    seed: PreTrainedTokenizerBase, bare: PreTrainedTokenizerBase
) -> None:
    for tokenizer in (seed, bare):
        ids = text_ids(tokenizer, "What is 2 plus 2?")
        assert ids == prompt_ids(tokenizer, "What is 2 plus 2?")
        assert ids == text_ids(tokenizer, [{"role": "user", "content": "What is 2 plus 2?"}])


def test_a_conversation_may_end_with_its_answer(seed: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    whole = messages_text(seed, turns, add_generation_prompt=False)
    assert whole == "### Instruction:\nHi\n\n### Response:\nHello\n\n"
    assert messages_text(seed, turns) == f"{whole}### Response:\n"


def test_prompts_and_answers_may_be_ids_already(seed: PreTrainedTokenizerBase) -> None:
    ids = prompt_ids(seed, "Hi")
    assert prompt_tokens(seed, ids) == ids == prompt_tokens(seed, "Hi")
    assert prompt_tokens(seed, [{"role": "user", "content": "Hi"}]) == ids
    answer = seed.encode("It is 4.", add_special_tokens=False)
    assert answer_tokens(seed, "It is 4.") == answer == answer_tokens(seed, answer)
    assert answer_tokens(seed, "") == [] == prompt_tokens(seed, [])


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"content": "Hi"}, {"role": "user", "content": None}, {"role": 3, "content": "Hi"}]
)
def test_a_message_without_role_or_content_is_named(seed: PreTrainedTokenizerBase, message: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match=r"message 2 is .* such as"):
        messages_text(seed, [{"role": "user", "content": "Hi"}, message])


def test_whatever_a_template_raises_becomes_an_error_of_ours(seed: PreTrainedTokenizerBase) -> None:
    for program in ("{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[9].content.x.y }}", "{% if %}"):
        seed.chat_template = program
        with pytest.raises(InvalidInput, match="refuses a conversation of the roles user:"):
            messages_text(seed, [{"role": "user", "content": "Hi"}])
