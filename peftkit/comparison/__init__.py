"""Many runs of one recipe side by side: what is varied, the processes that train it, and what comes out. Free of torch."""
