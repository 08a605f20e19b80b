"""Runners: one protocol over ONNX Runtime and compiled bundles."""
