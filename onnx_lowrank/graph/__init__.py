"""The graph side: the only importer of onnx and onnx-graphsurgeon."""
