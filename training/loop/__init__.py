"""The updates: the network, the Trainer and its parts, checkpoints, and resuming."""
