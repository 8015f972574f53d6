"""Defences that are attacked: clamps on latents, and fixes."""
