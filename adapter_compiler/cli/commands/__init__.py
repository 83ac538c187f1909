"""The commands: their options, what they run and print; one module for each command."""
