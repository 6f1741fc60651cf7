"""What the peers of a training run decide together: the recipe, the plan, wiring, steps, stages."""
