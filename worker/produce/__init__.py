"""Sends pictures of files and cameras to the frames topic."""
