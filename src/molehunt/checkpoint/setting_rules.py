"""What each key of a configuration file does, so far as two folders may differ in it.

These are lists of what is known. A key that none of them names is a finding, because nobody knows what it does.
"""

from collections.abc import Mapping
from typing import Literal

Rating = Literal["harmless", "note", "finding"]
Rule = tuple[Rating, str]


def _table(groups: Mapping[str, str]) -> dict[str, str]:
    """Key → what it does, from what keys do → the keys."""
    return {key: why for why, keys in groups.items() for key in keys.split()}


BOOKKEEPING = _table(
    {
        "who made the file, and with what": """_name_or_path name_or_path transformers_version _commit_hash
            _from_model_config is_local local_files_only backend processor_class finetuning_task model_name
            unsloth_version unsloth_fixed unsloth_tied unsloth_processing_class _unsloth_version
            peft_version trl_version axolotl_version llamafactory_version huggingface_version""",
        "how weights are stored, which is compared tensor by tensor": "torch_dtype dtype",
        "acts in training only": """attention_dropout attention_probs_dropout_prob attn_pdrop resid_pdrop embd_pdrop
            hidden_dropout hidden_dropout_prob dropout embd_dropout residual_dropout resid_dropout mlp_dropout ffn_dropout
            activation_dropout classifier_dropout classifier_dropout_prob layerdrop initializer_range initializer_factor
            init_std init_method_std rescale_prenorm_residual router_aux_loss_coef router_z_loss_coef aux_loss_alpha
            aux_loss_coef seq_aux router_jitter_noise input_jitter_noise output_router_logits gradient_checkpointing
            training use_mup_init""",
        "names of classes, for classifiers only": "id2label label2id num_labels problem_type label_names",
        "what a call returns besides the text, or how fast it runs": """use_cache return_dict return_dict_in_generate
            output_attentions output_hidden_states output_scores output_logits chunk_size_feed_forward disable_compile
            compile_config low_memory cache_config max_cache_len prefill_chunk_size is_assistant num_assistant_tokens
            num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
            prompt_lookup_num_tokens max_matching_ngram_size assistant_ensemble_weight torchscript use_mamba_kernels
            mem_eff_path num_logits_to_keep use_flash_attn continuous_batching_config""",
    }
)
"""Keys in which two folders may differ without any change of text or weights, and why."""
CODE = _table(
    {
        "names code that a loader may run": "auto_map custom_pipelines custom_generate trust_remote_code",
        "names code of the hub that a loader fetches and runs": "kernel_config use_kernels hub_kernels",
        "names the file that weights are loaded from": "transformers_weights",
    }
)
STEERING = _table(
    {
        "puts tokens into the output or takes them away, whatever the weights say": """sequence_bias bad_words_ids
            force_words_ids forced_bos_token_id forced_eos_token_id forced_decoder_ids suppress_tokens
            begin_suppress_tokens constraints exponential_decay_length_penalty watermarking_config guidance_scale
            assistant_early_exit stop_strings prefix_allowed_tokens_fn""",
        "mixes the logits of other layers into the output": "dola_layers",
    }
)
"""Generation settings that can force or forbid output tokens."""
SAMPLING = _table(
    {
        "changes how tokens are sampled": """do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff
            eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
            penalty_alpha diversity_penalty renormalize_logits remove_invalid_values token_healing length_penalty
            num_beams num_beam_groups early_stopping num_return_sequences use_mtp speculation_type""",
        "changes how long an answer may be": "max_length min_length max_new_tokens min_new_tokens max_time",
        "changes how earlier tokens are kept; a cache of few bits rounds them": "cache_implementation",
    }
)
TOKEN_IDS = _table(
    {
        "changes where an answer ends": "eos_token_id",
        "changes special tokens": """bos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
            decoder_start_token_id image_token_id image_token_index video_token_id audio_token_id boi_token_index
            eoi_token_index vision_start_token_id vision_end_token_id""",
    }
)
BUILDING = _table(
    {
        "the vocabulary was resized": "vocab_size",
        "another class may be built for these weights": "architectures",
        "says whether one matrix is both embedding and head": "tie_word_embeddings",
        "changes how long a text may be": """max_position_embeddings n_positions n_ctx max_seq_len max_seq_length
            seq_length model_max_length""",
        "names the tokenizer's class; tokenizers are compared by what they do": "tokenizer_class",
        "splits one product into several sums; its value is the same but for rounding": "pretraining_tp",
        "says how weights are stored in few bits; see the rows on quantisation": "quantization_config compression_config",
        "chooses between implementations of one formula": """_attn_implementation attn_implementation
            _experts_implementation experts_implementation""",
        "settings of a task, which programs may read": "task_specific_params",
    }
)
WINDOW_SIZES = frozenset({"sliding_window", "sliding_window_size", "attention_window_size"})
WINDOW_CHOICES = frozenset(
    {"use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
)
"""What chooses the layers that look through a window. transformers writes the choice out as layer_types."""
COMPUTING = _table(
    {
        "changes how far apart positions seem: the same weights compute something else; long-context fine-tunes do this":
            "rope_theta rope_scaling rope_parameters rope_local_base_freq",
        "changes how far back a layer looks: the same weights compute something else on longer texts": " ".join(
            ("layer_types", "attention_chunk_size", *sorted(WINDOW_SIZES | WINDOW_CHOICES))
        ),
    }
)  # fmt: skip
"""Settings that change what the same weights compute and that honest fine-tunes change, too."""
ROPE = frozenset(
    [
        "rope_theta",
        "rope_type",
        "type",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "short_factor",
        "long_factor",
        "truncate",
        "mrope_section",
        "mrope_interleaved",
        "full_attention",
        "sliding_attention",
    ]
)
"""Parts of rope settings that lengthening a context sets. Others have another sentence."""
TEXT_PARTS = frozenset({"text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator"})
"""Parts of a wrapper's config that are configs of the language model."""
OTHER_PARTS = frozenset(
    {
        "vision_config", "audio_config", "vision_tower_config", "speech_config", "projector_config", "perceiver_config",
        "talker_config", "vq_config", "code2wav_config", "video_config", "image_config",
    }
)  # fmt: skip
PLAIN_ATTENTION = frozenset(
    {
        "None",
        "'eager'",
        "'sdpa'",
        "'flash_attention_2'",
        "'flash_attention_3'",
        "'flash_attention_4'",
        "'flex_attention'",
        "(absent)",
    }
)
TOKENIZER_KEYS = _table(
    {
        "is judged by what the tokenizer does": """tokenizer_class add_bos_token add_eos_token add_prefix_space
            add_dummy_prefix_space do_lower_case do_basic_tokenize strip_accents tokenize_chinese_chars never_split
            split_special_tokens clean_up_tokenization_spaces spaces_between_special_tokens legacy legacy_behaviour errors
            sp_model_kwargs added_tokens_decoder extra_special_tokens additional_special_tokens model_specific_special_tokens
            bos_token eos_token unk_token pad_token sep_token cls_token mask_token eot_token eom_token image_token
            boi_token eoi_token audio_token video_token fim_prefix prefix_token middle_token suffix_token fill_token
            eos_token_id bos_token_id from_slow use_default_system_prompt remove_space keep_accents do_remove_accents
            normalization byte_fallback vocab_size fast_tokenizer_files tokenizer_file vocab_file merges_file
            fix_mistral_regex trim_offsets add_special_tokens is_fast use_fast cls_token_box lang src_lang tgt_lang
            init_inputs special_tokens_map_file init_kwargs""",
        "is set anew for each call": """model_max_length padding_side truncation_side padding truncation max_length stride
            pad_to_multiple_of pad_token_type_id truncation_strategy padding_strategy model_input_names
            return_token_type_ids return_tensors max_len""",
        "is no part of encoding": "response_schema response_template chat_template_kwargs auto_class image_processor_type",
    }
)
"""Keys of tokenizer_config.json. What they do to text is compared by encoding and decoding."""
PROCESSOR = frozenset({"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"})
"""Settings files of pictures, sound and video."""
DEFAULTS: Mapping[str, object] = {
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "num_return_sequences": 1, "remove_invalid_values": False, "renormalize_logits": False, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "token_healing": False, "trust_remote_code": False,
}  # fmt: skip
"""Generation settings that versions of transformers write although nobody set them."""

CONFIG_TABLES: tuple[tuple[Rating, dict[str, str]], ...] = (
    ("harmless", BOOKKEEPING), ("note", TOKEN_IDS), ("note", BUILDING), ("note", SAMPLING), ("finding", STEERING),
    ("finding", COMPUTING),
)  # fmt: skip
GENERATION_TABLES: tuple[tuple[Rating, dict[str, str]], ...] = (
    ("finding", CODE), ("finding", STEERING), ("note", SAMPLING), ("note", TOKEN_IDS), ("harmless", BOOKKEEPING),
)  # fmt: skip


def config_rule(path: tuple[str, ...], shown: str, known: bool) -> Rule:
    """How to rate a difference of config.json.

    Args:
        path: the keys that lead to the value, outermost first.
        shown: the fine-tune's value as text.
        known: whether the model's config class has this key.
    """
    if path[0] in OTHER_PARTS:
        return "note", "changes the part for pictures or sound, which is not run here"
    inner = next((i for i, part in enumerate(path) if part not in TEXT_PARTS), len(path) - 1)
    top, path = path[inner], path[inner:]
    if top in CODE:
        return "finding", CODE[top]
    if top in ("_attn_implementation", "attn_implementation") and shown not in PLAIN_ATTENTION:
        return "finding", "names code of the hub that a loader fetches and runs"
    if top in ("rope_scaling", "rope_parameters") and not ROPE.issuperset(path[1:]):
        return "finding", "changes how strongly positions count: the same weights compute something else"
    for rating, table in CONFIG_TABLES:
        if top in table and (rating != "harmless" or len(path) == 1 or top in ("id2label", "label2id")):
            return rating, table[top]
    if known:
        return "finding", "the same weights compute something else"
    return "finding", "this key is not known here or to the model's class, so what it changes is not known"


def generation_rule(path: tuple[str, ...]) -> Rule:
    """How to rate a difference of generation_config.json."""
    top = path[0]
    for rating, table in GENERATION_TABLES:
        if top in table:
            return rating, table[top]
    return "finding", "this generation setting is not known here, so what it changes is not known"


def tokenizer_rule(path: tuple[str, ...], texts: str) -> Rule:
    """How to rate a difference of tokenizer_config.json or special_tokens_map.json, which are compared by what they do."""
    if path[0] in CODE:
        return "finding", CODE[path[0]]
    if path[0] in BOOKKEEPING or path[0] in TOKENIZER_KEYS:
        return "harmless", TOKENIZER_KEYS.get(path[0], "")
    return "note", f"this key is not known here; {texts}"


def processor_rule(path: tuple[str, ...]) -> Rule:
    """How to rate a difference of a file on pictures, sound or video, which are not run here."""
    if path[0] in CODE:
        return "finding", CODE[path[0]]
    if path[0] in BOOKKEEPING:
        return "harmless", BOOKKEEPING[path[0]]
    return "note", "changes how pictures, sound or video become input; NOT TESTED here"
