"""Training a small policy of N1.6's architecture on the simulated robot's demonstrations."""
