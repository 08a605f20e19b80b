"""Kernel templates in TIR, reached by call_tir: quantized data is decoded in registers, never as a whole."""
