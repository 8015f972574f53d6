"""How much does the watch catch, and how many clean inputs does it flag?"""
