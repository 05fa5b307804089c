"""Many recipes: a matrix, engines that run its cells in processes of their own, a registry of what came out."""
