"""Data files as rows, and what such rows look like: free of torch, so that `init` can look before it asks."""
