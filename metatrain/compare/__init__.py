"""Comparison: several methods trained and judged alike on one dataset, and their leaderboard."""
