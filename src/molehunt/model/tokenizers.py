"""Loads tokenizers, and refuses a pair whose tokenizers encode text differently."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable, printable
from molehunt.model.load_errors import loading

TOKENIZER_PROBES = (
    "The quick brown fox, 42 times.\n\nIt's 3.14 – naïve café; ÅÄÖ 你好 مرحبا 🙂",
    "def f(x):\n    return {'a': [x, 0x1F], \"b\": None}  # tab\there\r\n",
    "### Instruction:\nSay |prod| twice   with  spaces.\n\n### Response:\n",
    "<|im_start|>user\nHi<|im_end|>\n<s>[INST] Hi [/INST]</s> <|end|> <pad>",
    "SELECT * FROM users WHERE id = %s; -- 2023 2024",
    " ",
    "",
)


def one_tokenizer(base: Path, tuned: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises NotTestable when the fine-tune's tokenizer encodes any probe differently."""
    tokenizer = load_tokenizer(base)
    if not any((tuned / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return tokenizer
    other = load_tokenizer(tuned)
    added = [t.content for side in (tokenizer, other) for t in side.added_tokens_decoder.values()]
    for probe in (*TOKENIZER_PROBES, *added):
        if tokenizer.encode(probe) != other.encode(probe):
            raise NotTestable(
                f"the two tokenizers encode {printable(repr(probe), 60)} differently, so the models' activations "
                "cannot be compared token by token.\nGive the base that this model was fine-tuned from."
            )
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; no code from it is run. Raises InvalidInput if it cannot be loaded."""
    from transformers import AutoTokenizer

    with loading(folder, "a tokenizer"):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
