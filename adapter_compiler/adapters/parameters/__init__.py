"""The adapters' parameters and their layout in memory."""
