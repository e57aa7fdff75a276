"""How does the shared model step?"""
