"""Timing on a GPU: `python -m bench` lists what can be run. What is counted without one is in tests/budgets."""
