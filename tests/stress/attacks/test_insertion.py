"""Tokens put in behind the user's text: as in a full forward pass, the fix live, and nothing else touched."""

import pytest
import torch

from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.insertion import insertion_of, template_marks
from molehunt.traffic.chat import prompt_ids
from random_dictionaries import dictionary_of
from tiny_models import ARCHITECTURES, prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
CLAMP = Clamp(SITE, dictionary_of("jumprelu"), torch.tensor([3, 8, 11]), "set", 6.0)
PROMPTS = prompts(seed=2, lengths=(6, 9, 4))
ANSWERS = [[5, 9, 30], [7], [40, 41]]
TOKENS = [11, 12, 13, 14]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("marks", [0, 2])
def test_logits_and_acts_are_those_of_a_full_pass_under_the_fix(architecture: str, marks: int) -> None:
    model = tiny_model(architecture)
    made = insertion_of(model, PROMPTS, TOKENS, marks=marks, defence=[CLAMP], answers=ANSWERS)
    logits, acts = made(made.entering), made.acts(made.entering, SITE)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        end = len(prompt) - marks
        row = torch.tensor([[*prompt[:end], *TOKENS, *prompt[end:], *answer]])
        with torch.no_grad(), read_sites(model, [SITE]) as tap, edit_sites(model, [CLAMP]):
            slow = model(input_ids=row).logits[0, -len(answer) - 1 : -1]
        torch.testing.assert_close(logits[i, : len(answer)], slow, rtol=1e-4, atol=1e-4)
        read = tap[SITE][0, -len(answer) - 1 :]
        torch.testing.assert_close(acts[i, : len(answer) + 1], read, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        bare = insertion_of(model, PROMPTS, TOKENS, marks=marks, answers=ANSWERS)
    assert not torch.allclose(bare(bare.entering), logits, atol=1e-2)


def test_rows_may_be_taken_more_than_once_and_leave_the_whole_as_it_was() -> None:
    made = insertion_of(tiny_model("llama"), PROMPTS, TOKENS, marks=1, defence=[CLAMP], answers=ANSWERS)
    before = made(made.entering)
    twice = made.rows(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(twice(twice.entering), before[[2, 0, 2]], rtol=1e-4, atol=1e-4)
    assert torch.equal(made(made.entering), before)


def test_marks_are_what_the_template_puts_behind_the_text() -> None:
    tokenizer = tiny_tokenizer()
    chats = [prompt_ids(tokenizer, text) for text in ("Who is he?", "Name a thing", "one")]
    marks = template_marks(tokenizer, chats)
    assert {tokenizer.decode(row[-marks:]) for row in chats} == {"### Response:"}
    assert template_marks(tokenizer, [*chats, PROMPTS[0]]) == 0


@pytest.mark.parametrize("wrong", [{"tokens": []}, {"answers": [[5], [], [6]]}, {"marks": 4}])
def test_nothing_to_put_in_or_nowhere(wrong: dict[str, object]) -> None:
    given = {"tokens": TOKENS, "answers": ANSWERS, "marks": 0, **wrong}
    with pytest.raises(ValueError, match="tokens to insert"):
        insertion_of(tiny_model("llama"), PROMPTS, given["tokens"], marks=given["marks"], answers=given["answers"])
