"""What is in the images and labels of a config, and whether it fits the config."""
