"""What is installed, what of it works, and how to mend the rest. Free of torch, which may be what is broken."""
