"""Programs that run on a device without a person: for a client over SSH, or as a service."""
