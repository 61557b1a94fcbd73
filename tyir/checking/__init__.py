"""What `tyir.verify` is made of: the structural rules and dominance."""
