"""Step 1, adaptive sparsity initialisation: which weights the task can do without."""
