"""`groot-int8 soak`: policy node and chunk executor for half an hour at full camera load."""
