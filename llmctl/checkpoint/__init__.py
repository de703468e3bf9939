"""Reads and writes checkpoints; the only room that knows on-disk bit layouts."""
