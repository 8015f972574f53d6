"""Does the guarded server lose alerts, memory or coverage under load?"""
