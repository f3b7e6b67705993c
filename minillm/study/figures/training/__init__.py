"""Drawings of the training questions."""
