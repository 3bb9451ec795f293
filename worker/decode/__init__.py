"""From hostile bytes to pixels; what is bad becomes a dead letter."""
