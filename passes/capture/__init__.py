"""A call becomes a graph, and the graph is proved."""
