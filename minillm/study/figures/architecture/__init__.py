"""Drawings of the architecture questions."""
