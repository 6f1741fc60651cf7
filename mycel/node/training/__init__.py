"""Training in one node: its stage of the model, the work on it, the steps, the state."""
