"""The server: what it takes and says, and its limits. Nothing here knows torch: the model is behind `serving.jobs.Engine`."""
