"""Reads labelled images: layouts on disk, class lists, frames and labels."""
