"""PEFT's file format: the configuration's fields, the names of tensors, and the weights that they belong to."""
