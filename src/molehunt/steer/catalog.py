"""The interventions that can be named."""

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
