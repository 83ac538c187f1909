"""Operators without an ONNX translation, or with a wrong one, in terms of operators that have one.

Each module has functions with the signatures of PyTorch's operators, and a table of them by operator. A function
returns ``NotImplemented`` where the operator's own translation is right.
"""
