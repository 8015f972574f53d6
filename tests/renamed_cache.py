"""A model that takes and gives its cache by a name of one's choice, whatever transformers calls it today."""

import inspect
from types import SimpleNamespace

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from molehunt.model.cache import left_by, with_cache
from tiny_models import tiny_model

OWN = next(iter(with_cache(tiny_model("llama", n_layers=1), None)))


def renamed(name: str) -> nn.Module:
    """The tiny Llama, its cache called `name` by the model, by its decoder, and in what both put out."""

    class Decoder(LlamaModel):
        def forward(self, input_ids=None, **inputs):
            out = super().forward(input_ids, **{OWN if key == name else key: value for key, value in inputs.items()})
            return SimpleNamespace(hidden=out.last_hidden_state, **{name: left_by(out)})

    class Model(LlamaForCausalLM):
        def forward(self, input_ids=None, logits_to_keep=0, **inputs):
            out = self.model(input_ids=input_ids, **inputs)
            return SimpleNamespace(logits=self.lm_head(out.hidden[:, -logits_to_keep:]), **{name: getattr(out, name)})

    shown = ("self", "input_ids", "attention_mask", "position_ids", name, "inputs_embeds", "use_cache")
    for of, more in ((Decoder, ()), (Model, ("logits_to_keep",))):
        of.forward.__signature__ = inspect.Signature(
            [inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in (*shown, *more)]
        )
    plain = tiny_model("llama")
    model = Model(plain.config)
    model.model = Decoder(plain.config)
    model.load_state_dict(plain.state_dict())
    model.generation_config = plain.generation_config
    return model.eval()
