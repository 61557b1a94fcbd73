"""The commands of each kind of op, lowered alone."""
