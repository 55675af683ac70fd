"""Adafactor for all tensors of a table: `step` has the phases and launches them."""
