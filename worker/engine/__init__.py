"""One pass for the micro-batches of many streams: predictions and proposed updates."""
