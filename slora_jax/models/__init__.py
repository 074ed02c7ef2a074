"""Llama: the one model that is served."""
