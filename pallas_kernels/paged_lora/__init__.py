"""LoRA over A and B in pages of the pool."""
