"""One training step and its parts: loss, optimiser, metrics, checkpoints."""
