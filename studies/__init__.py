"""Reproductions of what papers claim of batch normalization; study.py has what they share (docs/why.md)."""
