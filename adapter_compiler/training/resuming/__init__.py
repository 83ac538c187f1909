"""Parts of saving and loading a training state: its file, its checks, and how a failed load restores everything."""
