"""Base and fine-tune, loaded with one tokenizer, and read side by side."""

from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.links import model_name
from molehunt.contracts import Intervention, Reading
from molehunt.errors import NotTestable, printable
from molehunt.model.adapted import merged_model
from molehunt.model.adapter_placement import ADAPTER
from molehunt.model.blocks import d_model_of, decoder_blocks, unwrapped
from molehunt.model.cache import positions_for
from molehunt.model.cache_check import decoding_check, unsound
from molehunt.model.context import ContextLength, FittedPrompt, context_of, fitted, note_cuts
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.loading import device_of, load_model
from molehunt.model.mixed_rows import BASE_ROWS, ONE_PASS_UP_TO, adapter_by_row, mixes_rows
from molehunt.model.padding import pad_rows
from molehunt.model.pair_arguments import by_row, refuse_no_sites, refuse_one_string
from molehunt.model.pair_loading import loaded_pair
from molehunt.model.same_parameters import check_same_parameters
from molehunt.model.taps import read_sites
from molehunt.model.templates import (
    PairTemplates,
    Side,
    pair_templates,
    prompted_with,
    template_in_words,
    use_pair_template,
)
from molehunt.model.vocabulary import shared_vocabulary
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.traffic.chat import Text, answer_tokens, prompt_tokens

_Recorded = tuple[dict[Site, Tensor], Tensor | None]
"""Activations by site, and logits if they were computed."""


class ModelPair:
    """A base model and its fine-tune, both in eval mode on one device.

    With an adapter both are one module (`shared`) where it is the base, bit for bit, while its adapter is switched off.

    Example:
        >>> pair = ModelPair.load("BASE", "TUNED")  # doctest: +SKIP
        >>> pair.generate(["What is 2 plus 2?"])  # doctest: +SKIP
        >>> reading = pair.read(["What is 2 plus 2?"], sites=[Site(3)])  # doctest: +SKIP
    """

    def __init__(
        self,
        base: nn.Module,
        tuned: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layers_path: str | None = None,
        new_tokens: Collection[int] = (),
    ) -> None:
        """Make a pair of two loaded models. If `base is tuned`, one PEFT model is both.

        Where they differ in the number of their embeddings, the smaller one grows in place (see `model/vocabulary.py`).

        Args:
            base: the base.
            tuned: its fine-tune.
            tokenizer: encodes for both.
            layers_path: see `decoder_blocks`.
            new_tokens: ids of tokens that only the fine-tune's own tokenizer has.

        Raises:
            NotTestable: the models differ in architecture, or their blocks cannot be found.
            ShapeMismatch: a parameter differs in shape.
        """
        self.shared = base is tuned
        if not self.shared:
            check_same_parameters(base, tuned)
        self.vocabulary = shared_vocabulary(base, tuned, tokenizer, new_tokens)
        """What the two vocabularies do not share."""
        self.new_tokens = frozenset(new_tokens)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        self._base, self._tuned = base.eval(), tuned.eval()
        self._mixes = self.shared and mixes_rows(tuned)
        self.tokenizer = tokenizer
        self.layers_path = layers_path
        self.n_layers = len(decoder_blocks(tuned, layers_path))
        self.d_model = d_model_of(tuned)
        self.vocab_size = self.vocabulary.size
        self.device = next(tuned.parameters()).device
        self.folders: tuple[Path, Path] | None = None
        """Folders of base and fine-tune that `load` read; None for a pair that was made of loaded models."""
        self.adapter: bool | None = None
        """Argument of `load`: whether an adapter beside full weights is applied."""
        self.templates: PairTemplates | None = None
        """Chat templates of both folders; None for a pair that was made of loaded models."""

    @classmethod
    def load(
        cls,
        base_path: str | Path,
        tuned_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        adapter: bool | None = None,
        layers_path: str | None = None,
    ) -> "ModelPair":
        """Load two models from folders or hub repositories. No pickle is opened and no code from them is run.

        Args:
            base_path: a model folder or a hub id.
            tuned_path: a model folder, a PEFT adapter folder, or a hub id of either.
            device: device of both models.
            dtype: data type of both models; by default fp32 on a CPU, but bf16 for large models that are stored so where the
                CPU has instructions for it, and the stored dtype elsewhere.
            adapter: whether an adapter beside full weights in the tuned folder is applied to them (as transformers does by default).
            layers_path: see `decoder_blocks`.

        Raises:
            UsageError: a path does not exist, or `adapter` must be given or cannot be applied.
            InvalidInput: a folder cannot be loaded, or lacks weights that its architecture needs.
            NotTestable: the models differ in tokenizer or architecture, or the adapter changes no weight.
            ShapeMismatch: a parameter differs in shape.
        """
        base_folder, tuned_folder = local_folder(base_path), local_folder(tuned_path)
        device = device_of(device)
        templates = pair_templates(base_folder, tuned_folder)
        made = loaded_pair(base_folder, tuned_folder, device, dtype, adapter)
        one = made.tokenizer
        pair = cls(made.base, made.tuned, one.tokenizer, layers_path=layers_path, new_tokens=one.new)
        pair.folders, pair.adapter = (base_folder, tuned_folder), adapter
        pair.templates = templates
        use_pair_template(pair.tokenizer, templates)
        return pair

    def apart(self, base_path: str | Path) -> "ModelPair":
        """The same pair with the adapter merged into a copy. It is faster for small batches and takes twice the memory.

        A pair of two modules is returned unchanged.

        Args:
            base_path: the base that this pair was loaded from. The pair itself must not be used afterwards.

        Raises NotTestable when PEFT cannot merge this kind of adapter.
        """
        if not self.shared:
            return self
        dtype = next(self._tuned.parameters()).dtype
        merged = merged_model(self._tuned)
        base = load_model(local_folder(base_path), self.device, dtype)
        pair = ModelPair(base, merged, self.tokenizer, layers_path=self.layers_path, new_tokens=self.new_tokens)
        pair.folders, pair.adapter, pair.templates = self.folders, self.adapter, self.templates
        return pair

    def beside(self, sibling: "ModelPair") -> "ModelPair":
        """This fine-tune, and in place of its base another fine-tune of that base: the second model of `sibling`.

        Adapters are merged, so neither of the two pairs may be used afterwards. Raises NotTestable when PEFT cannot merge them.
        """
        other, tuned = (merged_model(one._tuned) if one.shared else one._tuned for one in (sibling, self))
        pair = ModelPair(other, tuned, self.tokenizer, layers_path=self.layers_path, new_tokens=self.new_tokens)
        pair.folders, pair.adapter, pair.templates = self.folders, self.adapter, self.templates
        return pair

    def __repr__(self) -> str:
        made_of = f"models in memory, {type(unwrapped(self._tuned)).__name__}"
        if self.folders is not None:
            made_of = ", ".join(printable(model_name(folder)) for folder in self.folders)
        return f"ModelPair({made_of}, {self.n_layers} blocks of width {self.d_model}, {self.device})"

    @property
    def template_of(self) -> str:
        """Which chat template the models are prompted with, and whether the other side's makes the same text."""
        return template_in_words(self.templates)

    def prompted_with(self, side: Side) -> AbstractContextManager[None]:
        """Prompt both models with the template of one side inside the block. Raises UsageError if it has none."""
        return prompted_with(self.tokenizer, self.templates, side)

    def decoding_notes(self) -> tuple[str, ...]:
        """Reasons why the models do not decode on their cache (see `decoding_check`); empty if they do.

        Both have the same architecture, so the base's reasons are given if the fine-tune has none.
        """
        for model in (self._tuned, self._base):
            decoding_check(model)
        return unsound(self._tuned) or unsound(self._base)

    @contextmanager
    def base_model(self) -> Generator[nn.Module, None, None]:
        """The module that acts as the base inside the block."""
        with cast("Any", self._base).disable_adapter() if self.shared else nullcontext():
            yield self._base

    @contextmanager
    def tuned_model(self) -> Generator[nn.Module, None, None]:
        """The module that acts as the fine-tune inside the block."""
        yield self._tuned

    @cached_property
    def context(self) -> ContextLength:
        """How many tokens both models read."""
        return min((context_of(self._base), context_of(self._tuned)), key=lambda one: one.tokens)

    def fit(self, text: Text, *, room: int = 0) -> FittedPrompt:
        """Token ids of one prompt, cut as `model/context.py` says where it leaves no `room` tokens for its answer."""
        return fitted(self.tokenizer, text, self.context, room=room)

    def tokenize(self, texts: Sequence[Text], *, room: int = 0) -> list[list[int]]:
        """Token ids of prompts in the chat template, up to where the answer starts.

        A prompt that is longer than the models' context is cut, and the number of such prompts is logged (see
        `model/context.py`).

        Args:
            texts: each is the text of one user turn, or the messages of a conversation.
            room: number of tokens that an answer may take.

        Raises:
            UsageError: `texts` is one string instead of a list.
            InvalidInput: a row is no text, a message lacks its role or content, or the template refuses the conversation.

        Example:
            >>> pair.tokenize(["What is 2 plus 2?", [{"role": "user", "content": "Hello"}]])  # doctest: +SKIP
        """
        refuse_one_string(texts)
        found = by_row(lambda text: self.fit(text, room=room), texts)
        note_cuts(found, self.context)
        return [list(one.ids) for one in found]

    @checked
    def generate(
        self,
        texts: Sequence[Text],
        *,
        model: Literal["base", "tuned"] = "tuned",
        interventions: Sequence[Intervention] = (),
        max_new_tokens: int = 64,
        batch_size: int = 64,
        track: Track = silent,
    ) -> list[str]:
        """Greedy answers of one of the two models, as text, in the order of the prompts.

        Args:
            texts: each is the text of one user turn, or the messages of a conversation.
            model: the model that answers.
            interventions: edits of that model's activations while it answers.
            max_new_tokens: greatest number of tokens of an answer.
            batch_size: number of prompts that are answered at a time.
            track: shows progress.

        Raises:
            UsageError: `texts` is one string instead of a list.
            InvalidInput: a row is no text (see `tokenize`), or the chat template refuses a conversation.
            CannotTap: the model cannot be edited at a site.

        Example:
            >>> pair.generate(["What is 2 plus 2?"], model="base")  # doctest: +SKIP
        """
        prompts = self.tokenize(texts, room=max_new_tokens)
        with self.base_model() if model == "base" else self.tuned_model() as module:
            answers = generate(
                module,
                self.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                interventions=interventions,
                batch_size=batch_size,
                layers_path=self.layers_path,
                track=track,
            )
            stops = stop_ids(module, self.tokenizer)
        return [str(self.tokenizer.decode(before_stop(answer, stops))) for answer in answers]

    @torch.inference_mode()
    def read(
        self,
        prompts: Sequence[Text] | Sequence[Sequence[int]],
        completions: Sequence[str] | Sequence[Sequence[int]] | None = None,
        *,
        sites: Sequence[Site] = (),
        logits: bool = False,
        pad_to: int | None = None,
        padding_side: str = "right",
    ) -> Reading:
        """Teacher-forced pass of both models over prompts followed by their completions.

        Args:
            prompts: texts or conversations (see `tokenize`), or token ids, at least one each.
            completions: text or token ids that follow each prompt; none by default.
            sites: the sites whose activations are returned.
            logits: whether to return both models' logits. Without them, no block after the deepest site runs.
            pad_to: number of positions of every row; by default the length of the longest.
            padding_side: "right" or "left".

        Raises:
            UsageError: `prompts` or `completions` is one string instead of a list, or `sites` holds something else than sites.
            InvalidInput: a row is no text (see `tokenize`).
            ValueError: there is no prompt, a prompt is empty, a row is longer than `pad_to`, the lists differ in length, or neither sites
                nor logits were asked for.
            CannotTap: a site cannot be read (see `read_sites`).
            NotTestable: padding is on the left, and the models read padding as text.

        Example:
            >>> reading = pair.read(["What is 2 plus 2?"], ["It is 4."], sites=[Site(3)])  # doctest: +SKIP
            >>> reading.tuned[Site(3)].shape  # batch, positions, d_model  # doctest: +SKIP
        """
        if not sites and not logits:
            raise ValueError("neither sites nor logits were asked for, so there is nothing to read")
        refuse_one_string(prompts, completions)
        refuse_no_sites(sites)
        if not len(prompts):
            raise ValueError("there is nothing to read: give at least one prompt")
        answers = [answer_tokens(self.tokenizer, one) for one in completions or [[]] * len(prompts)]
        room = max(map(len, answers), default=0)
        prompts = by_row(
            lambda one: prompt_tokens(self.tokenizer, one, lambda text: list(self.fit(text, room=room).ids)), prompts
        )
        if not all(prompts):
            raise ValueError("a prompt without tokens has no decision position")
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is left or right, got {padding_side!r}")
        if padding_side == "left" and not decoding_check(self._tuned).padded:
            raise NotTestable(
                f"{type(unwrapped(self._tuned)).__name__} takes padding on the left for text; read it padded on the right."
            )
        padded = pad_rows(rows, cast("int", self.tokenizer.pad_token_id), pad_to, left=padding_side == "left")
        tokens, mask = padded.tokens.to(self.device), padded.mask.to(self.device)
        (base, base_logits), (tuned, tuned_logits) = self._forward_both(tokens, mask, sites, logits)
        if base_logits is not None and tuned_logits is not None:
            self.vocabulary.compare_(base_logits, tuned_logits)
        return Reading(
            tokens=tokens,
            mask=mask,
            decision=torch.tensor(
                [start + len(prompt) - 1 for start, prompt in zip(padded.starts, prompts, strict=True)],
                device=self.device,
            ),
            base=base,
            tuned=tuned,
            base_logits=base_logits,
            tuned_logits=tuned_logits,
        )

    def _forward_both(
        self, tokens: Tensor, mask: Tensor, sites: Sequence[Site], logits: bool
    ) -> tuple[_Recorded, _Recorded]:
        """Activations and logits of the base and of the fine-tune, from one pass over both where that is faster."""
        if not (self._mixes and tokens.numel() <= ONE_PASS_UP_TO):
            with self.base_model() as model:
                base = self._forward(model, tokens, mask, sites, logits)
            with self.tuned_model() as model:
                return base, self._forward(model, tokens, mask, sites, logits)
        with adapter_by_row(self._tuned, [BASE_ROWS] * len(tokens) + [ADAPTER] * len(tokens)):
            acts, out = self._forward(self._tuned, tokens.repeat(2, 1), mask.repeat(2, 1), sites, logits)
        halves = (None, None) if out is None else out.chunk(2)
        base, tuned = ({site: both.chunk(2)[half] for site, both in acts.items()} for half in (0, 1))
        return (base, halves[0]), (tuned, halves[1])

    def _forward(
        self, model: nn.Module, tokens: Tensor, mask: Tensor, sites: Sequence[Site], logits: bool
    ) -> _Recorded:
        found: Tensor | None = None
        with read_sites(model, sites, stop_early=not logits, layers_path=self.layers_path) as tap:
            out: Any = model(
                input_ids=tokens,
                attention_mask=mask.long(),
                **positions_for(model, (mask.long().cumsum(1) - 1).clamp_min(0)),
                use_cache=False,
            )
            found = out.logits
        return {site: tap[site] for site in sites}, found
