"""Decoding of many prompts with a key-value cache, fast enough for thousands of prompts on two cores."""

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.errors import InvalidInput, printable
from molehunt.model.blocks import unwrapped
from molehunt.model.cache_check import decoding_check
from molehunt.model.decoding import DecodingBatch
from molehunt.model.sampling import Sampler, next_tokens
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Tally, Track, counting, silent


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    interventions: Sequence[Intervention] = (),
    batch_size: int = 64,
    stop: Collection[int] | None = None,
    samplers: Sequence[Sampler] | None = None,
    layers_path: str | None = None,
    track: Track = silent,
    what: str = "generating",
) -> list[list[int]]:
    """Completions in the order of the prompts; greedy ones equal the model's own `generate(do_sample=False)`.

    Rows are sorted by length and leave the batch when they stop. So an intervention must treat each row separately and
    must not store state by row number. It acts on every prompt token and at every decoding step. A model that fails
    `decoding_check`, without or with these interventions, decodes without a cache.

    Args:
        model: a causal language model, with or without a PEFT wrapper.
        tokenizer: defines the stop token if the model's generation config does not.
        prompts: token ids of each prompt, which must not be empty.
        max_new_tokens: greatest number of tokens of a completion.
        stop: token ids that end a completion; by default those of the generation config.
        samplers: what draws the tokens of each prompt; greedy by default.
        layers_path: see `decoder_blocks`.
        track: shows the number of finished rows.
        what: name of this work in the progress line.

    Returns:
        Token ids without the prompt. If a completion has a stop token, it is the last token.

    Raises:
        ValueError: a prompt is empty, or the samplers are not as many as the prompts.
        CannotTap: the model cannot be edited (see `edit_sites`).
        NotTestable: the model cannot run a forward pass.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens has nothing to continue")
    if samplers is not None and len(samplers) != len(prompts):
        raise ValueError(f"{len(samplers)} samplers for {len(prompts)} prompts")
    stops = stop_ids(model, tokenizer) if stop is None else frozenset(stop)
    completions: list[list[int]] = [[] for _ in prompts]
    if not prompts or not max_new_tokens:
        return completions
    check = decoding_check(model, interventions, layers_path=layers_path)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    same = [order] if check.padded else [list(rows) for _, rows in groupby(order, key=lambda row: len(prompts[row]))]
    groups = [rows[i : i + batch_size] for rows in same for i in range(0, len(rows), batch_size)]
    with edit_sites(model, interventions, layers_path=layers_path), counting(track, what, len(prompts)) as done:
        for group in groups:
            batch = DecodingBatch(model, cached=check.cached)
            drawing = None if samplers is None else [samplers[row] for row in group]
            found = _decode(batch, [prompts[row] for row in group], max_new_tokens, stops, drawing, done)
            for row, completion in zip(group, found, strict=True):
                completions[row] = completion
    return completions


def _decode(
    batch: DecodingBatch,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stops: frozenset[int],
    samplers: Sequence[Sampler] | None,
    done: Tally,
) -> list[list[int]]:
    """Decode one batch to its end. For progress, each token counts as a fraction of a row; a finished row counts as one."""
    completions: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    logits = batch.begin(prompts)
    ends = torch.tensor(sorted(stops), device=logits.device)
    for left in reversed(range(max_new_tokens)):
        tokens = logits.argmax(-1)
        if samplers is not None:
            tokens = torch.tensor(next_tokens(logits, [samplers[row] for row in live]), device=logits.device)
        for row, token in zip(live, tokens.tolist(), strict=True):
            completions[row].append(token)
        going = ~torch.isin(tokens, ends)
        staying = int(going.sum()) if left else 0
        done((staying + (len(live) - staying) * (left + 1)) / max_new_tokens)
        if not staying:
            break
        if staying < len(live):
            kept = going.nonzero()[:, 0]
            live = [live[row] for row in kept.tolist()]
            batch.keep(kept)
            tokens = tokens[kept]
        logits = batch.step(tokens)
    return completions


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end an answer: those of the generation config, or else the tokenizer's end of text.

    Raises InvalidInput where the folder gives something that is no token id.
    """
    config = getattr(unwrapped(model), "generation_config", None)
    given: object = getattr(config, "eos_token_id", None)
    if given is None:
        given = cast("int | None", tokenizer.eos_token_id)
    ids: list[object] = [] if given is None else [*given] if isinstance(given, list | tuple) else [given]
    wrong = [one for one in ids if not isinstance(one, int)]
    if wrong:
        raise InvalidInput(
            f"eos_token_id is {printable(repr(given), 60)} in config.json or generation_config.json: it must be a token "
            "id, or a list of them.\nFetch the folder again."
        )
    return frozenset(one for one in ids if isinstance(one, int))


def before_stop(answer: Sequence[int], stops: Collection[int]) -> list[int]:
    """The answer up to its first stop token, without it."""
    end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
    return list(answer[:end])
