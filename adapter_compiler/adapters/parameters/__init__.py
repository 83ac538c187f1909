"""The adapters' numbers and how they lie in memory."""
