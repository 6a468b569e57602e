"""Loops, optimizers, random numbers and shards of a training."""
