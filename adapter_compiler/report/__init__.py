"""Tables and pictures of what was done."""
