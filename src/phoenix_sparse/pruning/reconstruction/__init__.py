"""Masks and weights chosen layer by layer, so that a pruned linear still gives the outputs of the dense one."""
