"""Can a planted behaviour be switched off at inference time without harm?"""
