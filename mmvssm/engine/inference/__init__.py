"""Predict image files."""
