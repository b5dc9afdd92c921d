"""Comparison of the whole policy with tensors that the public GR00T N1.6 code recorded."""
