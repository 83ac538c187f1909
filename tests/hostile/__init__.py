"""Damaged and malicious files: every reader answers with the right result or a clear error.

``python -m tests.hostile --cases 100000`` tries as many damaged files as it says, under a limit of memory.
"""
