"""The same mathematics in less time or memory."""
