"""The console: what it knows of the streams, and its pages. Where its records come from is `worker.console`'s."""
