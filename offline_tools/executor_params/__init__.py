"""`groot-int8 executor-params`: the chunk executor's parameters, begun from a bundle."""
