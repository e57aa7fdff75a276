"""How long do sites train, and how is the mean taken?"""
