"""What segment memories compute, on arrays: reads, writes and the maps of their states."""
