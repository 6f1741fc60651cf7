"""Training with few bytes: what a round's contributions are, and how its result moves what all peers share."""
