"""Measures what worker and guard cost, and what they are worth."""
