"""Unlearning: is a topic that was erased still there, and does a monitor see that it was erased?"""
