"""Transforms ONNX graphs: imports, cuts, gates, output graphs, precision, weight store, checks."""
