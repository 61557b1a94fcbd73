"""What tyir-verify is made of: comparison with the checkpoint's own model, and the first op that differs."""
