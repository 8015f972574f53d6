"""Greedy decoding of many prompts with a key-value cache, fast enough for thousands of them on two cores."""

import inspect
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.model.blocks import unwrapped
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Track, silent


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
    layers_path: str | None = None,
    track: Track = silent,
    what: str = "generating",
) -> list[list[int]]:
    """Greedy completions, in the order of the prompts; equal to the model's own `generate(do_sample=False)`.

    Rows are sorted by length, and leave the batch once they have stopped, so an intervention must treat each row by
    itself and keep no state by row number. It acts on every prompt token and at every decoding step.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        tokenizer: names the stop token where the model's generation config does not.
        prompts: token ids, at least one each.
        max_new_tokens: tokens at most in one completion.
        stop: token ids that end a completion; by default what the generation config says.
        layers_path: see `decoder_blocks`.
        track: shown batches.
        what: what progress calls this.

    Returns:
        Token ids without the prompt; a stop token, where one came, is the last.

    Raises:
        ValueError: a prompt is empty.
        CannotTap: the model cannot be edited (see `edit_sites`).
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens has nothing to continue")
    stops = stop_ids(model, tokenizer) if stop is None else frozenset(stop)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    completions: list[list[int]] = [[] for _ in prompts]
    with edit_sites(model, interventions, layers_path=layers_path):
        for group in track(groups, what, len(groups)):
            done = _decode(model, [prompts[row] for row in group], max_new_tokens, stops)
            for row, completion in zip(group, done, strict=True):
                completions[row] = completion
    return completions


def _decode(
    model: nn.Module, prompts: list[Sequence[int]], max_new_tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    """One batch, left-padded so that all rows continue at the same column."""
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)[:, None]
    mask = (torch.arange(width, device=device) >= width - lengths).long()
    ends = torch.tensor(sorted(stops), device=device)
    last_only: dict[str, Any] = {"logits_to_keep": 1} if keeps_last_logits(model) else {}

    completions: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    tokens, cache = padded, None
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(max_new_tokens):
        out: Any = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        cache = out.past_key_values
        tokens = cast("torch.Tensor", out.logits[:, -1].argmax(-1, keepdim=True))
        for row, token in zip(live, tokens[:, 0].tolist(), strict=True):
            completions[row].append(token)
        going = ~torch.isin(tokens[:, 0], ends)
        if not bool(going.all()):
            kept = going.nonzero()[:, 0]
            if not len(kept):
                break
            live = [live[row] for row in kept.tolist()]
            cache.batch_select_indices(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return completions


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end an answer: the generation config's, else the tokenizer's end of text."""
    config = getattr(unwrapped(model), "generation_config", None)
    ids: int | list[int] | None = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = cast("int | None", tokenizer.eos_token_id)
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)


def before_stop(answer: Sequence[int], stops: Collection[int]) -> list[int]:
    """The answer up to its first stop token, without it."""
    end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
    return list(answer[:end])


def keeps_last_logits(model: nn.Module) -> bool:
    """Whether `forward` can leave out the logits of all but the last positions."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
