"""Holds latency tables, measured or estimated by a roofline model, and the warnings about them."""
