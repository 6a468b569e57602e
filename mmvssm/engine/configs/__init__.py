"""Read a config, see that what it needs is there, and change it."""
