"""Faults around a call: failing allocations (allocations.cpp) and processes that do not start (gloo_starts.py)."""
