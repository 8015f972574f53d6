"""Judgement of attacks: valid rows, drift, controls and radii."""
