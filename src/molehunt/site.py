"""Places of activations in a model. The module imports nothing heavy, because the contracts use sites, too."""

import re
from dataclasses import dataclass
from operator import index
from typing import Literal, get_args

Stream = Literal["resid", "attn", "mlp"]
STREAMS: tuple[Stream, ...] = get_args(Stream)


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """One place to read or edit activations: a decoder block and a stream.

    Law: `Site.parse(str(site)) == site`.

    Raises:
        ValueError: the layer is no whole number or negative, or the stream is not one of `STREAMS`.

    Example:
        >>> site = Site(6, "resid")
        >>> str(site)
        'L6.resid'
        >>> Site.parse("L6.resid") == site
        True
    """

    layer: int
    """Number of the decoder block, from 0."""
    stream: Stream = "resid"
    """`resid` is the block's output (before any final norm); `attn` and `mlp` are what those modules return."""

    def __post_init__(self) -> None:
        try:
            index(self.layer)
        except TypeError:
            raise ValueError(
                f"layer is a whole number, such as Site(3), and got {self.layer!r}; Site.parse('L3.resid') reads text"
            ) from None
        if self.layer < 0:
            raise ValueError(f"layer must be 0 or more, got {self.layer}")
        if self.stream not in STREAMS:
            raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {self.stream!r}")

    def __str__(self) -> str:
        return f"L{self.layer}.{self.stream}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that a text such as `"L6.resid"` names. Raises ValueError for any other text."""
        found = re.fullmatch(r"L(\d{1,6})\.(resid|attn|mlp)", text)
        if found is None:
            raise ValueError(f"a site reads like L6.resid (streams: {', '.join(STREAMS)}), got {text!r}")
        return cls(int(found[1]), found[2])  # pyright: ignore[reportArgumentType]
