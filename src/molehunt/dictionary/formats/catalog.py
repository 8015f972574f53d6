"""The dictionary formats that can be read, in the order in which they are tried."""

CATALOG: dict[str, str] = {
    "sae-lens": "molehunt.dictionary.formats.sae_lens:FORMAT",
    "sparsify": "molehunt.dictionary.formats.sparsify:FORMAT",
    "gemma-scope": "molehunt.dictionary.formats.gemma_scope:FORMAT",
    "gemma-scope-2": "molehunt.dictionary.formats.gemma_scope_2:FORMAT",
    "llama-scope": "molehunt.dictionary.formats.llama_scope:FORMAT",
    "dictionary-learning": "molehunt.dictionary.formats.dictionary_learning:FORMAT",
    "qwen-scope": "molehunt.dictionary.formats.qwen_scope:FORMAT",
}
