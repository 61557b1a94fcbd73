"""One die's program as Edge10 commands."""
