"""What a triplet is worth, and which ones a budget keeps."""
