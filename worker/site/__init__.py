"""A site: its folder, its bundle, and whether all that it needs is there."""
