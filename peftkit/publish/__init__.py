"""What goes to the hub of a run: which files, the model card, and the upload."""
