"""ONNX in, ONNX out: cut, gate, output graph, weight store, checks."""
