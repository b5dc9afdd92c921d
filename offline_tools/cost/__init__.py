"""What an observation costs: counted from the graphs, predicted for a device."""
