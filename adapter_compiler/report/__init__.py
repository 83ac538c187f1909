"""Pictures of ranks and models, and the data in them."""
