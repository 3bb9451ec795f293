"""Predictions, update events and dead letters."""
