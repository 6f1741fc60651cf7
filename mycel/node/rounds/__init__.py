"""A group's rounds on a real network."""
