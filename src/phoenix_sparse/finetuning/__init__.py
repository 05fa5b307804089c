"""Step 2, sparsity-aware fine-tuning: elastic low-rank adapters trained through the mask, and the search among them."""
