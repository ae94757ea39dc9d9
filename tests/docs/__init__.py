"""The documents: every command runs, every fragment is valid, what is shown is what the program says."""
