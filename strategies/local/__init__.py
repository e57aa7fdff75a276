"""What keeps sites from drifting?"""
