"""Judging quantisation schemes against each other, on models that make it hard for them."""
