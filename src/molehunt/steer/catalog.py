"""The interventions that can be named."""

CATALOG: dict[str, str] = {
    "ablate": "molehunt.steer.ablate:Ablate",
    "add": "molehunt.steer.add:Add",
    "clamp": "molehunt.steer.clamp:Clamp",
    "clip": "molehunt.steer.clip:Clip",
    "replace": "molehunt.steer.replace:Replace",
}
