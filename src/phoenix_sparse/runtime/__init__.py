"""Running sparse models: packed weights, from the file to the token."""
