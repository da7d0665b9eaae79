"""Pure tensor functions on torch alone."""
