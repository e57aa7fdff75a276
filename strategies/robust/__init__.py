"""What if a site lies?"""
