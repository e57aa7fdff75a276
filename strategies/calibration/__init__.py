"""Can the confidence be trusted?"""
