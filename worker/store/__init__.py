"""Stream states in Redis: claimed by token, written as one with their position."""
