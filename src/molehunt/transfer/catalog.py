"""The maps that can be named. What is called is `fit, held_out` → a `TransferMap`, the same way in each table."""

FROM_MOMENTS: dict[str, str] = {
    "identity": "molehunt.transfer.procrustes:identity",
    "procrustes": "molehunt.transfer.procrustes:procrustes",
    "reduced-rank": "molehunt.transfer.ridge:reduced_rank",
    "ridge": "molehunt.transfer.ridge:ridge",
    "shuffled": "molehunt.transfer.ridge:shuffled",
}
"""Closed forms, of `PairMoments`; identity and shuffled are the controls."""
FROM_ACTIVATIONS: dict[str, str] = {
    "affine": "molehunt.transfer.trained:affine",
    "autoencoder": "molehunt.transfer.trained:autoencoder",
    "random-features": "molehunt.transfer.random_features:random_features",
}
"""Of `PairActs`: trained by gradient as published, and a closed form that needs the activations themselves."""
CATALOG: dict[str, str] = {**FROM_MOMENTS, **FROM_ACTIVATIONS}
