"""What the CUDA backends of the ops share."""
