"""Fields of OpenAI's and vLLM's APIs that change an answer and are not served here: refused by name, never ignored."""

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[object, ...]]
"""Names of fields, each with the values at which it changes nothing."""
EVERYWHERE: Neutral = {
    # OpenAI
    "n": (None, 1),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    # vLLM
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "logits_processors": (None, []),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_decoding_backend": (None,),
    "guided_whitespace_pattern": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "mm_processor_kwargs": (None, {}),
    "vllm_xargs": (None, {}),
    "prompt_embeds": (None,),
    # names that other servers and libraries use for such settings
    "do_sample": (None,),
    "enable_thinking": (None,),
    "max_new_tokens": (None,),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "typical_p": (None, 1),
}
IN_CHATS: Neutral = {
    "echo": (None, False),
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, False),
    "continue_final_message": (None, False),
    "chat_template": (None,),
    "documents": (None, []),
    "prompt": (None,),
}
IN_TEXTS: Neutral = {
    "add_special_tokens": (None, True),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "max_completion_tokens": (None,),
    "messages": (None,),
    "top_logprobs": (None,),
}
INSTEAD: Mapping[str, str] = {
    "n": "send several requests; they are batched",
    "best_of": "send several requests; they are batched",
    "max_new_tokens": "use max_tokens",
    "max_completion_tokens": "use max_tokens",
    "top_logprobs": "use logprobs, a number",
    "prompt_logprobs": "use echo and logprobs of /v1/completions",
    "do_sample": "use temperature; 0 is greedy",
    "enable_thinking": "use chat_template_kwargs",
    "messages": "use /v1/chat/completions",
    "chat_template_kwargs": "use /v1/chat/completions",
    "prompt": "use /v1/completions",
}
"""What to use in place of some of them."""


def refusal_of(name: str, value: Any, neutral: Neutral) -> str | None:
    """Why a field is refused; None if it changes nothing, or if its name is not in the list."""
    if value in neutral.get(name, (value,)):
        return None
    return f"{name} is not served here: {INSTEAD.get(name, 'leave it out')}"
