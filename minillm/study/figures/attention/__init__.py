"""Drawings of the attention questions."""
