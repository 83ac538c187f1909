"""What every file of ours is made with: atomic writing, one schema check, undo."""
