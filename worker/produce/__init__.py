"""Pictures of files and cameras into the frames topic."""
