"""From a prompt to the text a model sees: the tokenizer's own chat template, or Alpaca where it has none."""

from transformers import PreTrainedTokenizerBase

ALPACA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}\n\n"
    "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""The Alpaca markers as a chat template, without the preamble sentence."""


def render_alpaca(prompt: str, response: str | None = None) -> str:
    """`prompt` between the Alpaca markers, ending where the answer starts or with the answer."""
    return f"### Instruction:\n{prompt}\n\n### Response:\n{response or ''}"


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """One user turn as the model reads it, up to where the answer starts."""
    if not tokenizer.chat_template:
        return render_alpaca(prompt)
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of one user turn, ready for the answer to be generated.

    The last id is the decision position: what the model puts out there is the first token of its answer.
    """
    text = prompt_text(tokenizer, prompt)
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template)  # a template writes its own
    return list(encoded["input_ids"])  # pyright: ignore[reportArgumentType]
