"""Hooks of trainings that may stop at any time."""
