"""A run as one HTML file that people read: ranks, budget, loss, spectra, what was pruned and why."""
