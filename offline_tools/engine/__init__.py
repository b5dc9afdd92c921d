"""What TensorRT makes of a bundle's graphs."""
