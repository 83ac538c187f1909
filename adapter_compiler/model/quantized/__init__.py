"""Frozen weights in few bits (QLoRA), through bitsandbytes."""
