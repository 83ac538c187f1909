"""How a budget follows optimizer steps: closures, wrappers, several optimizers, copies of the model."""
