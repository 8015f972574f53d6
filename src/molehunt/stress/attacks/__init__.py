"""Searches for a perturbation or a suffix that makes a suppressed behaviour recover."""
