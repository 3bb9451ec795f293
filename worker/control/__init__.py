"""Commands to streams while workers run."""
