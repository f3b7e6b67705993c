"""Drawings of the notebooks on fine-tuning."""
