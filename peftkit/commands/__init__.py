"""One file per command: the story of that command, top to bottom, without logic of its own."""
