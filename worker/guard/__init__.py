"""Whether an update becomes the state, and whose parameters answer."""
