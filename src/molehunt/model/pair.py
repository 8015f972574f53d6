"""Base and fine-tune, loaded with one tokenizer, and read side by side."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Reading
from molehunt.errors import NotTestable, ShapeMismatch, UsageError, printable
from molehunt.model.blocks import d_model_of, decoder_blocks, unwrapped
from molehunt.model.cache import positions_for
from molehunt.model.cache_check import decoding_check, unsound
from molehunt.model.loading import (
    ADAPTER,
    ADAPTER_CONFIG,
    apply_adapter,
    checksum,
    device_of,
    load_model,
    local_folder,
    one_tokenizer,
)
from molehunt.model.taps import read_sites
from molehunt.site import Site

BASE_ROWS = "__base__"
"""PEFT's name for rows of a mixed batch that no adapter acts on."""
ONE_PASS_UP_TO = 256
"""Tokens up to which one pass over base and adapted rows together beats two.

On one CPU core it took 0.56 of the time at 16 tokens, 0.83 at 128, 0.96 at 1024, 1.23 at 6144 (d_model 128).
"""


class ModelPair:
    """A base model and its fine-tune, both in eval mode on one device.

    With a LoRA adapter both are one module (`shared`), whose adapter is switched off to be the base.
    """

    def __init__(
        self, base: nn.Module, tuned: nn.Module, tokenizer: PreTrainedTokenizerBase, *, layers_path: str | None = None
    ) -> None:
        """Two models as they are; `base is tuned` says that one PEFT model with a LoRA adapter is both.

        Raises:
            NotTestable: the two differ in architecture, or their blocks cannot be found.
            ShapeMismatch: a parameter differs in shape.
        """
        self.shared = base is tuned
        if not self.shared:
            _check_same_parameters(base, tuned)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        self._base, self._tuned = base.eval(), tuned.eval()
        self._mixes = self.shared and _mixes_rows(tuned)
        self.tokenizer = tokenizer
        self.layers_path = layers_path
        self.n_layers = len(decoder_blocks(tuned, layers_path))
        self.d_model = d_model_of(tuned)
        self.vocab_size = int(cast("Any", unwrapped(tuned)).get_input_embeddings().weight.shape[0])
        self.device = next(tuned.parameters()).device

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
        """Load two models from folders or hub repositories; no pickle is opened and no code of theirs is run.

        Args:
            base_path: a model folder or a hub id.
            tuned_path: a model folder, a PEFT LoRA adapter folder, or a hub id of either.
            device: where both models go.
            dtype: of both models; by default fp32 on a CPU and the stored dtype elsewhere.
            adapter: for a tuned folder that holds an adapter beside full weights, whether the adapter is applied to
                them (as transformers does unasked).
            layers_path: see `decoder_blocks`.

        Raises:
            UsageError: a path leads nowhere, or `adapter` must be given or cannot be met.
            InvalidInput: a folder cannot be loaded, or lacks weights that its architecture needs.
            NotTestable: the two are no base and fine-tune (tokenizer, architecture), or the adapter is no LoRA.
            ShapeMismatch: a parameter differs in shape.
        """
        base_folder, tuned_folder = local_folder(base_path), local_folder(tuned_path)
        if (base_folder / ADAPTER_CONFIG).is_file():
            raise UsageError(
                f"{printable(base_folder.name)} holds an adapter ({ADAPTER_CONFIG}); a base is plain weights.\n"
                "Loaders would apply it unasked. Move it out, and give its folder as the fine-tune."
            )
        device = device_of(device)
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        has_adapter = (tuned_folder / ADAPTER_CONFIG).is_file()
        has_weights = (tuned_folder / "config.json").is_file()
        if adapter and not has_adapter:
            raise UsageError(f"{printable(tuned_folder.name)} holds no adapter ({ADAPTER_CONFIG}) to apply.")
        if has_adapter and has_weights and adapter is None:
            raise UsageError(
                f"{printable(tuned_folder.name)} holds full weights and an adapter beside them; loaders apply the "
                "adapter unasked.\nSay which of the two is meant: --adapter applies it, --no-adapter leaves it out."
            )
        if has_adapter and not has_weights and adapter is False:
            raise UsageError(f"{printable(tuned_folder.name)} holds only an adapter; --no-adapter leaves nothing.")
        tokenizer = one_tokenizer(base_folder, tuned_folder)
        base = load_model(base_folder, device, dtype)
        if not has_adapter or adapter is False:
            return cls(base, load_model(tuned_folder, device, dtype), tokenizer, layers_path=layers_path)
        if has_weights:
            tuned = load_model(tuned_folder, device, dtype)
            return cls(base, apply_adapter(tuned, tuned_folder), tokenizer, layers_path=layers_path)
        before = [(parameter, checksum(parameter)) for parameter in base.parameters()]
        tuned = apply_adapter(base, tuned_folder)
        # PiSSA and trained biases change the base in place: then switching the adapter off does not give it back
        if all(checksum(parameter) == was for parameter, was in before):
            return cls(tuned, tuned, tokenizer, layers_path=layers_path)
        return cls(load_model(base_folder, device, dtype), tuned, tokenizer, layers_path=layers_path)

    def apart(self, base_path: str | Path) -> "ModelPair":
        """The same pair with the adapter merged into a copy: faster for many small batches, for twice the memory.

        Args:
            base_path: the base that this pair was loaded from. The pair itself must not be used afterwards.

        A pair that is two modules already is returned as it is.
        """
        if not self.shared:
            return self
        dtype = next(self._tuned.parameters()).dtype
        merged = cast("nn.Module", cast("Any", self._tuned).merge_and_unload())
        base = load_model(local_folder(base_path), self.device, dtype)
        return ModelPair(base, merged, self.tokenizer, layers_path=self.layers_path)

    def decoding_notes(self) -> tuple[str, ...]:
        """What keeps the models from decoding on their cache (see `decoding_check`); empty where nothing does.

        Both have one architecture: the base's reasons are given where the fine-tune has none.
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

    @torch.inference_mode()
    def read(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]] | None = None,
        *,
        sites: Sequence[Site] = (),
        logits: bool = False,
        pad_to: int | None = None,
        padding_side: str = "right",
    ) -> Reading:
        """Teacher-forced pass of both models over prompts followed by their completions.

        Args:
            prompts: token ids, at least one each.
            completions: token ids that follow; none by default.
            sites: where activations are kept.
            logits: keep both models' logits; without them no block after the deepest site runs.
            pad_to: positions of every row; by default those of the longest.
            padding_side: "right" or "left".

        Raises:
            ValueError: a prompt is empty, a row is longer than `pad_to`, the lists differ in length, or neither sites
                nor logits were asked for.
            CannotTap: a site cannot be read (see `read_sites`).
            NotTestable: rows are to be padded on the left, and the models take padding for text.
        """
        if not sites and not logits:
            raise ValueError("neither sites nor logits were asked for, so there is nothing to read")
        if not all(prompts):
            raise ValueError("a prompt without tokens has no decision position")
        rows = [
            [*prompt, *completion]
            for prompt, completion in zip(prompts, completions or [[]] * len(prompts), strict=True)
        ]
        width = max(map(len, rows)) if pad_to is None else pad_to
        if max(map(len, rows)) > width:
            raise ValueError(f"a row of {max(map(len, rows))} tokens is longer than pad_to={pad_to}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is left or right, got {padding_side!r}")
        if padding_side == "left" and not decoding_check(self._tuned).padded:
            raise NotTestable(
                f"{type(unwrapped(self._tuned)).__name__} takes padding on the left for text; read it padded on the right."
            )
        tokens = torch.full((len(rows), width), cast("int", self.tokenizer.pad_token_id))
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        starts = [0 if padding_side == "right" else width - len(row) for row in rows]
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            tokens[i, start : start + len(row)] = torch.tensor(row)
            mask[i, start : start + len(row)] = True
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        if self._mixes and tokens.numel() <= ONE_PASS_UP_TO:
            names = [BASE_ROWS] * len(rows) + [ADAPTER] * len(rows)
            with _adapter_by_row(self._tuned, names):
                both, both_logits = self._forward(self._tuned, tokens.repeat(2, 1), mask.repeat(2, 1), sites, logits)
            base, tuned = ({site: acts.chunk(2)[half] for site, acts in both.items()} for half in (0, 1))
            base_logits, tuned_logits = (None, None) if both_logits is None else both_logits.chunk(2)
        else:
            with self.base_model() as model:
                base, base_logits = self._forward(model, tokens, mask, sites, logits)
            with self.tuned_model() as model:
                tuned, tuned_logits = self._forward(model, tokens, mask, sites, logits)
        return Reading(
            tokens=tokens,
            mask=mask,
            decision=torch.tensor(
                [start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=True)], device=self.device
            ),
            base=base,
            tuned=tuned,
            base_logits=base_logits,
            tuned_logits=tuned_logits,
        )

    def _forward(
        self, model: nn.Module, tokens: Tensor, mask: Tensor, sites: Sequence[Site], logits: bool
    ) -> tuple[dict[Site, Tensor], Tensor | None]:
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


def _mixes_rows(model: nn.Module) -> bool:
    """Whether one batch can hold rows with and without the adapter: plain LoRA on linear layers and embeddings."""
    from peft.tuners import lora
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in model.modules() if isinstance(m, lora.LoraLayer)]
    plain = all(isinstance(m, lora.Linear | lora.Embedding) and not m.lora_variant for m in layers)
    return plain and not any(isinstance(m, AuxiliaryTrainingWrapper) for m in model.modules())


@contextmanager
def _adapter_by_row(model: nn.Module, names: list[str]) -> Generator[None, None, None]:
    """Row i of each batch inside the block runs under adapter `names[i]`.

    PEFT's own `adapter_names` argument leaves its hooks behind when a pass is stopped early.
    """
    from peft.tuners import lora

    def name_rows(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    handles = [
        module.register_forward_pre_hook(name_rows, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, lora.LoraLayer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_same_parameters(base: nn.Module, tuned: nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in _plain_parameters(base)}
    tuned_shapes = {name: tuple(parameter.shape) for name, parameter in _plain_parameters(tuned)}
    for name, shape in shapes.items():
        if tuned_shapes.get(name, shape) != shape:
            raise ShapeMismatch(name, shape, tuned_shapes[name])
    odd = sorted(shapes.keys() ^ tuned_shapes.keys())
    if odd:
        where = "base" if odd[0] in shapes else "fine-tune"
        raise NotTestable(
            f"only the {where} has {printable(odd[0])}: the two are not of one architecture.\n"
            "Give the base that this model was fine-tuned from."
        )


def _plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their names outside PEFT; what an adapter adds is left out."""
    inner = unwrapped(model)
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if ".lora_" not in name and ".modules_to_save." not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter
