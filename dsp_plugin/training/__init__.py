"""What a run of training needs around its steps: data, checkpoints, recomputation, random numbers, the step log."""
