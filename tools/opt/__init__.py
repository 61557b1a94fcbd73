"""What tyir-opt is made of."""
