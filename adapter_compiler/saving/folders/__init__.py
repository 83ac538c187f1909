"""Folders that hold adapters: ours and PEFT's, read one site at a time."""
