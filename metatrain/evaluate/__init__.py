"""Evaluation: protocols, metrics, baselines, report."""
