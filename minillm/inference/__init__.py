"""Inference: from a trained model to text."""
