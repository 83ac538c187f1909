"""One module for each format of another run time: what it can express, how it is written, and how it is read back."""
