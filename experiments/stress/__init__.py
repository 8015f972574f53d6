"""Stress tests of fixes: does a suppressed behaviour come back under attack?"""
