"""Rollouts: prompts → sampler actors → rewards → committed Parquet rows, on Ray Data."""
