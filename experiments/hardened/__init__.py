"""Defences against attackers who know them."""
