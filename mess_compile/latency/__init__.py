"""Latency tables: measured, or estimated by a roofline model; warnings about them."""
