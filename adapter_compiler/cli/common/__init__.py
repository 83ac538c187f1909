"""What several commands need: how a model is named, and how results and errors are written."""
