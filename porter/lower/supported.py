"""The operators and element types that the importer takes, as names; importing this imports no TVM."""

from __future__ import annotations

# One of another domain than ONNX's own is written domain.Name. A test holds this to the importer's table.
OPERATORS: frozenset[str] = frozenset(
    """
    Abs Add And Attention Cast CastLike Concat Constant ConstantOfShape Cos DequantizeLinear Div Equal Erf Exp
    Expand Gather Gelu Gemm Greater GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log MatMul Max
    Min Mod Mul Neg Not Or Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceMax ReduceMean ReduceMin
    ReduceSum Relu Reshape RotaryEmbedding Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Swish Tanh
    TensorScatter Transpose Unsqueeze Where porter.PackInt4 porter.UnpackInt4
    """.split()  # noqa: SIM905
)

# As onnx_ir.DataType spells them.
TYPES: frozenset[str] = frozenset(
    """
    BOOL INT32 INT64 FLOAT FLOAT16 INT8 UINT8 INT4 FLOAT8E4M3FN FLOAT8E5M2 FLOAT8E4M3FNUZ FLOAT8E5M2FNUZ
    """.split()  # noqa: SIM905
)
