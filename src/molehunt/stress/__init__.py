"""Attacks on a fix that stays active: does the suppressed behaviour recover?

The folders import in this order only, each from those before it:

1. `attacks`: how a perturbation or a suffix is searched. Nothing here knows what a defence is beyond its interventions.
2. `defences`: what is attacked, and which latents a clamp acts on.
3. `evaluation`: which rows count, how far the watched values drifted, the controls, and the radii.
4. This folder: `text_behaviour` runs all of it on one fix, `study` holds what was found, `certificate` writes it down.
"""
