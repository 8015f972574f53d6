"""Molehunt audits a fine-tuned language model against its base."""

__version__ = "0.1.0"
