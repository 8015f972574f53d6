"""The maps that can be named.

A row is a function of `fit, held_out` that returns a map. The type of its first argument says what the map is fitted on:
`PairMoments` (closed forms) or `PairActs` (the activations themselves); see `map_method`. A plugin's function in the
entry-point group `molehunt.maps` says it the same way.
"""

GROUP = "molehunt.maps"
"""Entry-point group of plugins."""
CATALOG: dict[str, str] = {
    "affine": "molehunt.transfer.trained:affine",
    "autoencoder": "molehunt.transfer.trained:autoencoder",
    "identity": "molehunt.transfer.procrustes:identity",
    "procrustes": "molehunt.transfer.procrustes:procrustes",
    "random-features": "molehunt.transfer.random_features:random_features",
    "reduced-rank": "molehunt.transfer.ridge:reduced_rank",
    "ridge": "molehunt.transfer.ridge:ridge",
    "shuffled": "molehunt.transfer.ridge:shuffled",
}
"""Identity and shuffled are the controls."""
