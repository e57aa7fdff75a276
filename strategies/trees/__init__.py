"""Can a person read the model?"""
