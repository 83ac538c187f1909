"""Scores of triplets, and the choice of the triplets that a budget keeps."""
