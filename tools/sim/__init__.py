"""What tyir-sim is made of: what it is given, and what it is asked."""
