"""What the console's documentation shows: `python -m tests.console picture` and `python -m tests.console fleet`."""
