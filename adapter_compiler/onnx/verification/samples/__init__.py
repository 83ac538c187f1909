"""The user's own data: batches become calls of the model, and a file is compared with PyTorch on each of them."""
