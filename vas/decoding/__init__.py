"""The guided decoding engine: plain torch on Hugging Face causal LMs of any architecture.

One step of every active sequence at once: base model → candidates → values → guided
policy → sample. See `engine.Engine`.
"""
