"""Fitting value models to TD targets, on Ray Train with DeepSpeed."""
