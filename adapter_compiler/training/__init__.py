"""Training of adapters: rank budgets, initialization from data, and resuming a run."""
