"""Files of other tools, in and out, and adapters folded into files without the model's code."""
