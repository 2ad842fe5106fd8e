"""Recommendation: adapt to events, rank the catalogue."""
