"""Maps between the activations of two models: how well do they fit, and what do answers through them look like?"""
