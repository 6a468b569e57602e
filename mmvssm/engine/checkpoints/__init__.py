"""Files of checkpoints: written whole, read safely, of the right model."""
