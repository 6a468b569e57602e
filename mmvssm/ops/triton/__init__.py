"""What the Triton backends of the ops share."""
