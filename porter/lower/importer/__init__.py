"""ONNX to Relax: one table, one small function per operator."""
