"""Running IR on numpy: storage of tensors, weights from checkpoints, constant expressions, dies in
lockstep.
"""
