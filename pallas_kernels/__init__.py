"""Kernels over the page pool: arrays in, arrays out."""
