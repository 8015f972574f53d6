"""Tiny random models and a tokenizer, built offline."""

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import nn

VOCAB = 96
D_MODEL = 32
N_LAYERS = 3
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox")


def tiny_model(architecture: str, seed: int = 0, *, n_layers: int = N_LAYERS) -> nn.Module:
    """A random causal language model in eval mode, weights large enough that its greedy text varies."""
    import transformers as hf

    # tied random embeddings would repeat their input token for ever
    common = {
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    llama = {
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    if architecture == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**common, **llama))
    elif architecture == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**common, **llama))
    elif architecture == "gemma3":
        config = hf.Gemma3TextConfig(
            **common,
            **llama,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", *["sliding_attention"] * (n_layers - 2)][:n_layers],
        )
        model = hf.Gemma3ForCausalLM(config)
    elif architecture == "gpt2":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(**common, n_embd=D_MODEL, n_layer=n_layers, n_head=4, n_positions=256, initializer_range=0.3)
        )
    else:
        model = hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(
                **common,
                hidden_size=D_MODEL,
                intermediate_size=48,
                num_hidden_layers=n_layers,
                num_attention_heads=4,
                max_position_embeddings=256,
                initializer_range=0.3,
            )
        )
    return model.eval()


@cache
def tiny_tokenizer():
    """A byte-less BPE of letters, with the ids that the tiny models expect."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 32 + VOCAB - 3)]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def save(model: nn.Module, folder: Path) -> Path:
    """Model and tokenizer as a folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts(seed: int = 0, lengths: tuple[int, ...] = (3, 9, 5, 17)) -> list[list[int]]:
    """Random token rows without special tokens."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]


LORA_TARGETS = {"gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"]}


def with_lora(model: nn.Module, architecture: str, seed: int = 7, **options):
    """A PEFT model around `model` whose adapter does something."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        target_modules=LORA_TARGETS.get(architecture, ["q_proj", "o_proj", "down_proj"]),
        r=4,
        fan_in_fan_out=architecture == "gpt2",
        **{"init_lora_weights": False, **options},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, config).eval()


def hooks(model: nn.Module) -> int:
    """Hooks of every kind on every module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


class Blocks(nn.Module):
    """Linear blocks between an embedding and a head, with a transformers config; subclasses run them oddly."""

    def __init__(self, n_layers: int = 3, width: int = 8) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(
            num_hidden_layers=n_layers, hidden_size=width, num_attention_heads=1, vocab_size=VOCAB
        )
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers))
        self.head = nn.Linear(width, VOCAB)

    def run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = self.run(layer, x)
        return self.head(x)
