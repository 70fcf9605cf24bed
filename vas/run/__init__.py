"""A run: its directory, its stages, and the Ray cluster they use."""
