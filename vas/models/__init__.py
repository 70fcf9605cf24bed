"""Base models and value models: loading, saving, and the value model itself."""
