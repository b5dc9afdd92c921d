"""Datasets that policies are trained and judged with."""
