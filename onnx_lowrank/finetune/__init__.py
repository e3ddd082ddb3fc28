"""Training on the ONNX graph itself: the only importer of torch (extra ``finetune``)."""
