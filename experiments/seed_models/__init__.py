"""The embedded models, trained again, each with its card."""
