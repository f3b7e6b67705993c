"""Drawings of the position questions."""
