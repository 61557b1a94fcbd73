"""What `tyir.verifier` is made of: the structural rules and dominance."""
