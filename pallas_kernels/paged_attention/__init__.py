"""Attention over K and V in pages of the pool."""
