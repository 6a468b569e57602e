"""What a model's parts ask of each other and of batches, found before training."""
