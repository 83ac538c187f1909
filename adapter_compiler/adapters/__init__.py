"""The adapters of a model as data: parameters, plans, names, sums; no calls, no files."""
