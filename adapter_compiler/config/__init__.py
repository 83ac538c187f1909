"""What a user decides, as validated data; nothing here runs a model."""
