"""From decoded frames to micro-batches."""
