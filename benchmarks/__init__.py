"""Benchmarks, one folder per question; `python -m benchmarks --help`."""
