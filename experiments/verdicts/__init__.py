"""How often is the audit's verdict right on planted models and their clean twins?"""
