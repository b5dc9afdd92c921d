"""Latency and memory of bundles side by side, in one run on one machine."""
