"""Generated data and the demonstration that runs the whole road on them."""
