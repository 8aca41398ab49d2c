"""What goes wrong around a call: memory that ends (allocations.cpp), processes that do not come up (gloo_starts.py)."""
