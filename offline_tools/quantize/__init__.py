"""From a float bundle to an INT8 bundle: statistics, schemes, Q/DQ graphs and their proof."""
