"""Attention: the operator, its exact block-wise form, and its relatives."""
