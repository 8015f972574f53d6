"""Attacks on a fix that stays in place: does the suppressed behaviour come back?"""
