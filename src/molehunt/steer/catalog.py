"""The interventions that can be named.

A class that consists of tensors and numbers says `savable = True`: a `Fix` can hold it in a file. Plugins' classes join
in the entry-point group `molehunt.interventions`.
"""

GROUP = "molehunt.interventions"
"""Entry-point group of plugins."""
CATALOG: dict[str, str] = {
    "ablate": "molehunt.steer.ablate:Ablate",
    "add": "molehunt.steer.add:Add",
    "clamp": "molehunt.steer.clamp:Clamp",
    "clip": "molehunt.steer.clip:Clip",
    "error-shrink": "molehunt.steer.error_shrink:ErrorShrink",
    "mapped": "molehunt.steer.mapped:Mapped",
    "replace": "molehunt.steer.replace:Replace",
    "span-clamp": "molehunt.steer.span_clamp:SpanClamp",
}
