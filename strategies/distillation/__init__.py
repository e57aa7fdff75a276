"""Who teaches whom?"""
