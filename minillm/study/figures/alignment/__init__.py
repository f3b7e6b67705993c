"""Drawings of the alignment questions."""
