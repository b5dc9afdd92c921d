"""Comparing a bundle with the checkpoint it came from."""
