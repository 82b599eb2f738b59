"""A device over SSH: connection, files, and the programs that build and measure there."""
