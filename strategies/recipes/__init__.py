"""Which schedule, start and hygiene?"""
