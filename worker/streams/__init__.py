"""The states of the streams at hand, between engine and store."""
