"""The operators and element types that the importer takes, as names; importing this imports no TVM."""

from __future__ import annotations

# One of another domain than ONNX's own is written domain.Name. A test holds this to the importer's table.
OPERATORS: frozenset[str] = frozenset(
    """
    Abs Add And ArgMax ArgMin Attention Cast CastLike Ceil Clip Concat Constant ConstantOfShape Conv Cos
    CumSum DequantizeLinear Div Dropout Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max Min Mod Mul Neg Not Or Pad Pow
    QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape RotaryEmbedding Round Selu SequenceAt Shape Sigmoid
    Sign Sin Size Slice Softmax Softplus Split SplitToSequence Sqrt Squeeze Sub Sum Swish Tanh
    TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor porter.PackInt4 porter.UnpackInt4
    """.split()  # noqa: SIM905
)

# As onnx_ir.DataType spells them.
TYPES: frozenset[str] = frozenset(
    """
    BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT FLOAT16 BFLOAT16 DOUBLE
    INT4 FLOAT8E4M3FN FLOAT8E5M2
    """.split()  # noqa: SIM905
)
