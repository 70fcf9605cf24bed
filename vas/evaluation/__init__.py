"""Methods compared on held-out prompts: base, best-of-N, VAS; and the report."""
