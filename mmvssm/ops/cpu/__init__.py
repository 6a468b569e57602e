"""The compiled CPU kernels and how they are called."""
