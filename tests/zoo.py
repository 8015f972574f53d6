"""The tiny random models of many architectures, which `python -m experiments what-is-read` reads from folders, too."""

from experiments.what_is_read.zoo import OPTIONS, VOCAB, WIDTH, zoo_model

__all__ = ["OPTIONS", "VOCAB", "WIDTH", "zoo_model"]
