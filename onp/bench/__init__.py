"""Benchmarks: what the tool costs and what it reaches, as ratios within one run."""
