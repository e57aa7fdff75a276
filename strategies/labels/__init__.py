"""What if labels are missing, contradictory, or new?"""
