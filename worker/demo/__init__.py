"""The demo: six cameras of a sorting line, replayed through a real broker, store and worker."""
