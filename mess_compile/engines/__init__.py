"""Provides what an engine library loads: ONNX files in a precision, or engines built from them."""
