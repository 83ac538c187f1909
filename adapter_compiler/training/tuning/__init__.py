"""Choices that are made by trying: the learning rate, the smallest size of an adapter, the intrinsic dimension."""
