"""Losses beside the user's own: balanced experts, and hidden states like those of a teacher's blocks."""
