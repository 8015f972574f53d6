"""Is a trigger found in a system message, an earlier turn or 900 tokens as in a single prompt?"""
