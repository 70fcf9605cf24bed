"""Ray Serve: base and value models behind an OpenAI-compatible endpoint, where every request dials its rewards."""
