"""Quantized frozen weights (QLoRA), with bitsandbytes."""
