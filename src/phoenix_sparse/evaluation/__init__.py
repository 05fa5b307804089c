"""Evaluation: accuracy through lm-eval, perplexity, FLOPs."""
