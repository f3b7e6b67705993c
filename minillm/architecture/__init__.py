"""Architecture: the layers of a decoder and the decoder itself."""
