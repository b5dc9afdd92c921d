"""GR00T N1.6 in PyTorch, written for export; loads the released checkpoint layout."""
