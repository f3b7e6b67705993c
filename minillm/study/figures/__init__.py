"""The drawings of the notebooks: pure functions from numbers to matplotlib figures, one module a question."""
