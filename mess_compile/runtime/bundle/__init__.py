"""The bundle as a file, read with suspicion."""
