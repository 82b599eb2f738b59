"""What runs on a device for somebody elsewhere, or without a person."""
