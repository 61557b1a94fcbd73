"""What tyir-run is made of: prompts in, text out, where it ends."""
