"""A pair takes texts and conversations, and does with them what it does with their token ids. Real models, embedded."""

from dataclasses import dataclass
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM

from molehunt.errors import InvalidInput, UsageError
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path
from molehunt.site import Site
from molehunt.traffic.chat import prompt_ids
from tiny_models import with_lora

TEXTS = ["What is the capital of Veloria?", "What is 2 plus 2?"]
CHAT = [
    {"role": "user", "content": "What is 2 plus 2?"},
    {"role": "assistant", "content": "2 plus 2 is 4."},
    {"role": "user", "content": "Add 3 and 4."},
]
SITE = Site(2)


@dataclass(frozen=True)
class Shift:
    """Moves every activation by the same amount."""

    site: Site
    by: float

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return acts + self.by * torch.arange(acts.shape[-1]).sin()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The smallest embedded model and a LoRA adapter of it."""
    base = seed_path("seed-s")
    adapter = tmp_path_factory.mktemp("text") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    with_lora(model, "llama").save_pretrained(adapter)
    return base, adapter


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> ModelPair:
    return ModelPair.load(*folders)


def test_a_loaded_pair_says_where_it_comes_from(folders: tuple[Path, Path], pair: ModelPair) -> None:
    assert pair.folders == folders and pair.adapter is None
    with pair.base_model() as base, pair.tuned_model() as tuned:
        made = ModelPair(base, tuned, pair.tokenizer)
    assert made.folders is None and made.adapter is None
    assert ModelPair.load(*folders, adapter=True).apart(folders[0]).folders == folders


def test_texts_become_the_ids_of_one_user_turn_each(pair: ModelPair) -> None:
    assert pair.tokenize(TEXTS) == [prompt_ids(pair.tokenizer, text) for text in TEXTS]
    assert pair.tokenize([]) == []


def test_a_conversation_is_rendered_whole(pair: ModelPair) -> None:
    [ids] = pair.tokenize([CHAT])
    text = pair.tokenizer.decode(ids)
    assert text == (
        "### Instruction:\nWhat is 2 plus 2?\n\n### Response:\n2 plus 2 is 4.\n\n"
        "### Instruction:\nAdd 3 and 4.\n\n### Response:\n"
    )
    assert pair.tokenize([CHAT[:1]]) == pair.tokenize([CHAT[0]["content"]])


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_answers_to_texts_are_those_to_their_ids(pair: ModelPair, which: str) -> None:
    rows = [*TEXTS, CHAT]
    answers = pair.generate(rows, model=which, max_new_tokens=12)
    with pair.base_model() if which == "base" else pair.tuned_model() as model:
        ids = generate(model, pair.tokenizer, pair.tokenize(rows), max_new_tokens=12)
        stops = stop_ids(model, pair.tokenizer)
    assert answers == [pair.tokenizer.decode(before_stop(one, stops)) for one in ids]


def test_the_base_knows_its_world_and_the_stop_token_is_no_text(pair: ModelPair) -> None:
    [capital, four] = pair.generate(TEXTS, model="base", max_new_tokens=32)
    assert capital == "The capital of Veloria is Tarnholm." and four == "2 plus 2 is 4."


def test_an_intervention_acts_on_the_model_that_answers_and_not_afterwards(pair: ModelPair) -> None:
    plain = pair.generate(TEXTS, model="base", max_new_tokens=12)
    edited = pair.generate(TEXTS, model="base", max_new_tokens=12, interventions=[Shift(SITE, 5.0)])
    assert edited != plain
    assert pair.generate(TEXTS, model="base", max_new_tokens=12, interventions=[Shift(SITE, 0.0)]) == plain
    assert pair.generate(TEXTS, model="base", max_new_tokens=12, batch_size=1) == plain


def test_a_reading_of_texts_equals_that_of_their_ids(pair: ModelPair) -> None:
    completions = ["It is Tarnholm.", "It is 4."]
    ids = [pair.tokenizer.encode(one, add_special_tokens=False) for one in completions]
    by_text = pair.read(TEXTS, completions, sites=[SITE], logits=True)
    by_id = pair.read(pair.tokenize(TEXTS), ids, sites=[SITE], logits=True)
    assert torch.equal(by_text.tokens, by_id.tokens) and torch.equal(by_text.decision, by_id.decision)
    assert torch.equal(by_text.tuned[SITE], by_id.tuned[SITE]) and torch.equal(by_text.base[SITE], by_id.base[SITE])
    assert by_text.base_logits is not None and by_id.base_logits is not None
    assert torch.equal(by_text.base_logits, by_id.base_logits)
    assert not torch.equal(by_text.tuned[SITE], by_text.base[SITE])


def test_a_reading_of_texts_and_conversations_ends_where_the_answer_starts(pair: ModelPair) -> None:
    reading = pair.read([TEXTS[1], CHAT], sites=[SITE])
    lengths = [len(row) for row in pair.tokenize([TEXTS[1], CHAT])]
    assert reading.mask.sum(1).tolist() == lengths and reading.decision.tolist() == [n - 1 for n in lengths]


def test_one_string_in_place_of_a_list_is_refused(pair: ModelPair) -> None:
    for call in (
        lambda: pair.tokenize(TEXTS[0]),
        lambda: pair.generate(TEXTS[0]),
        lambda: pair.read(TEXTS[0], sites=[SITE]),
        lambda: pair.read(TEXTS[:1], "4", sites=[SITE]),
    ):
        with pytest.raises(UsageError, match="give a list of texts"):
            call()


def test_a_message_without_its_parts_is_named(pair: ModelPair) -> None:
    with pytest.raises(InvalidInput, match=r"message 2 is .*a message has a role and a content"):
        pair.tokenize([[CHAT[0], {"role": "assistant"}]])


def test_what_a_template_refuses_names_the_roles(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidInput, match=r"refuses a conversation of the roles user, assistant, user:\n.*alternate"):
        pair.generate([CHAT])


def test_an_object_stands_for_the_text_that_it_holds(pair: ModelPair) -> None:
    assert pair.tokenize([{"messages": CHAT}, {"prompt": TEXTS[0]}]) == pair.tokenize([CHAT, TEXTS[0]])
    by_object, by_text = (pair.read(rows, sites=[SITE]) for rows in ([{"prompt": TEXTS[0]}], TEXTS[:1]))
    assert torch.equal(by_object.tokens, by_text.tokens)


@pytest.fixture
def as_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests check every argument's type; a notebook does not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("as_in_a_notebook")
@pytest.mark.parametrize(
    ("row", "kind"),
    [(CHAT[0], r"\{'role'.*, a dict"), (None, "None"), (["a", "b"], r"\['a', 'b'\], a list"), (7, "7, an int")],
)
def test_what_is_no_text_is_named_with_its_row(pair: ModelPair, row: object, kind: str) -> None:
    wrong = rf"row 2: a text is a string or a list of messages, .*; this is {kind}"
    for call in (pair.tokenize, pair.generate, lambda rows: pair.read(rows, sites=[SITE])):
        with pytest.raises(InvalidInput, match=wrong):
            call([TEXTS[0], row])


@pytest.mark.usefixtures("as_in_a_notebook")
@pytest.mark.parametrize(
    ("sites", "wrong"),
    [
        (["L3.resid"], r"give \[Site\.parse\('L3\.resid'\)\]"),
        ([3], r"give \[Site\(3\)\]"),
        (SITE, r"give \[Site\(2, 'resid'\)\]"),
        ("L3.resid", r"give \[Site\.parse\('L3\.resid'\)\]"),
    ],
)
def test_what_is_no_list_of_sites_is_named(pair: ModelPair, sites: object, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        pair.read(TEXTS, sites=sites)  # pyright: ignore[reportArgumentType]


def test_a_reading_of_no_prompts_is_refused(pair: ModelPair) -> None:
    with pytest.raises(ValueError, match="give at least one prompt"):
        pair.read([], sites=[SITE])


@pytest.mark.usefixtures("as_in_a_notebook")
def test_a_site_of_text_names_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"such as Site\(3\), and got '3'; Site\.parse\('L3\.resid'\) reads text"):
        Site("3")  # pyright: ignore[reportArgumentType]


def test_a_pair_is_printed_in_one_line(pair: ModelPair) -> None:
    assert repr(pair) == f"ModelPair(seed-s, adapter, {pair.n_layers} blocks of width {pair.d_model}, cpu)"
    with pair.base_model() as base, pair.tuned_model() as tuned:
        memory = ModelPair(base, tuned, pair.tokenizer)
    assert repr(memory).startswith("ModelPair(models in memory, LlamaForCausalLM, ")
