"""What one training step costs, in time and memory, beside other implementations of it."""
