"""Judging what the policy and the node do on recorded data."""
