"""Whole closed-loop comparisons: a plan of cells, their episodes, paired tests and tables."""
