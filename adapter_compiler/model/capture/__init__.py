"""What an example call shows, and a call as an fx graph with the adapters in it."""
