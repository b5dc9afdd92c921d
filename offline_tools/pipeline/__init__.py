"""All steps from a checkpoint to an INT8 bundle, skipping what is up to date."""
