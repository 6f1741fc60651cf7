"""Training with one byte per update on a real network."""
