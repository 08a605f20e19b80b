"""ONNX to a compiled library and a plan, through TVM: the only package that imports tvm besides the runners."""
