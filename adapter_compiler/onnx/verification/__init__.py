"""Whether an exported file computes what the model computes, and where it does not."""
