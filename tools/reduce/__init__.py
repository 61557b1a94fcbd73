"""What tyir-reduce is made of."""
