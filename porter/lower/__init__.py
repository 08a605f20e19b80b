"""ONNX to a compiled library and a plan, through TVM: with the runners, all that imports tvm."""
