"""The interventions that can be named."""

CATALOG: dict[str, str] = {
    "ablate": "molehunt.steer.ablate:Ablate",
    "add": "molehunt.steer.add:Add",
    "clip": "molehunt.steer.clip:Clip",
    "replace": "molehunt.steer.replace:Replace",
}
