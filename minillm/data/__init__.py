"""Text and how a model reads it: tokens, the text that ships, packing, cleaning."""
