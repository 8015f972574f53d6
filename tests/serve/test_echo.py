"""Where tokens begin in a text: also where a character has several tokens, and where a token has no text."""

from collections.abc import Sequence
from functools import cache

import pytest
from transformers import PreTrainedTokenizerBase

from molehunt.serve.echo import TokenOffsets, echoed
from molehunt.serve.text import UNFINISHED

TEXT = "a é 😀 z"


@cache
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each byte, and a first token that the tokenizer adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def sliced(text: str, offsets: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in zip(offsets, [*offsets[1:], len(text)], strict=True)]


def test_offsets_slice_a_text_whose_characters_have_several_tokens() -> None:
    tokenizer = byte_tokenizer()
    one = echoed(tokenizer, TEXT, tuple(tokenizer.encode(TEXT)))
    assert one.text == TEXT and one.ids[0] == tokenizer.bos_token_id
    # the first token has no text; of the tokens of one character the last one has it
    assert sliced(one.text, one.offsets) == ["", "a", " ", "", "é", " ", "", "", "", "😀", " ", "z"]


@pytest.mark.parametrize("ids", [[2, 3], [0, 40, 41], [40, 0, 41], [0, 0, 40], [200]])
def test_token_ids_that_no_text_has_are_echoed_as_they_decode(ids: list[int]) -> None:
    tokenizer = byte_tokenizer()
    one = echoed(tokenizer, ids, tuple(ids))
    if tokenizer.encode(one.text) == ids:
        text = echoed(tokenizer, one.text, tuple(ids))
        assert (one.text, one.offsets) == (text.text, text.offsets) and "<s>" not in one.text
    else:
        assert one.text == tokenizer.decode(ids)
    assert len(one.offsets) == len(ids) and one.offsets == sorted(one.offsets)


def test_offsets_of_a_stream_go_on_where_the_last_piece_ended() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    whole = TokenOffsets(tokenizer, 5).of(ids)
    pieces = TokenOffsets(tokenizer, 5)
    assert [at for token in ids for at in pieces.of([token])] == whole and whole[0] == 5


def test_bytes_that_are_no_text_are_counted_piece_by_piece() -> None:
    tokenizer = byte_tokenizer()
    (broken, *_) = [token for token in range(2, 258) if tokenizer.decode([token]) == UNFINISHED]
    ids = [*[broken] * 100, *tokenizer.encode("ab", add_special_tokens=False)]
    one = echoed(tokenizer, ids, tuple(ids))
    assert one.text == UNFINISHED * 100 + "ab" and one.offsets[-1] == 101
    assert len(set(one.offsets)) > 5, "they are not decoded all at once, which takes the square of their number"
