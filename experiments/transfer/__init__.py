"""Does an activation patch of one model work in another, through a map between them?"""
