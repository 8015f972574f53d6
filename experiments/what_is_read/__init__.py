"""Is every common kind of folder read as it is, or refused with the reason?"""
