"""Whole-system measurements: every published number comes from here."""
