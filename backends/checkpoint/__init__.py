"""Checkpoints as a target: what a module's weights have become, as a folder that everybody loads."""
