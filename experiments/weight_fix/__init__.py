"""Can a planted behaviour be edited out of the weights, or trained away?"""
