"""The quality benchmark: every method at equal final size, each with its own best rate and betas."""
