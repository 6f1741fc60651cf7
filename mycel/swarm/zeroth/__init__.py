"""Training with one byte per update: shared directions, a log of bytes, and the state that follows from both."""
