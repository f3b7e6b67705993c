"""Drawings of the distributed questions."""
