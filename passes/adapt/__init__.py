"""Put adapters into a graph, and take them out."""
