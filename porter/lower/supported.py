"""The operators and element types that the importer takes, as names; importing this imports no TVM."""

from __future__ import annotations

# One of another domain than ONNX's own is written domain.Name. A test holds this to the importer's table.
OPERATORS: frozenset[str] = frozenset(
    """
    Abs Add And ArgMax ArgMin Attention Cast CastLike Ceil Clip Concat Constant ConstantOfShape Conv Cos
    CumSum DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand Flatten Floor
    Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf
    IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul MatMulInteger Max Min Mod
    Mul Neg Not Or Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape RotaryEmbedding Round Selu
    SequenceAt Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split SplitToSequence Sqrt Squeeze Sub
    Sum Swish Tanh TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor porter.DecodeE2M1
    porter.DecodeE2M3 porter.DecodeE3M2 porter.DecodeE3M4 porter.DecodeE4M3 porter.DecodeE4M3B11FNUZ
    porter.DecodeE4M3FN porter.DecodeE4M3FNUZ porter.DecodeE5M2 porter.DecodeE5M2FNUZ porter.DecodeInt2
    porter.DecodeInt3 porter.DecodeInt4 porter.DecodeInt8 porter.DecodeMx6 porter.DecodeMx9
    porter.DecodeShifts porter.DecodeUint2 porter.DecodeUint3 porter.DecodeUint4 porter.DecodeUint8
    porter.PackInt4 porter.RepeatRows porter.ScaleBlocks porter.SubtractBlocks porter.UnpackInt4
    """.split()  # noqa: SIM905
)

# Functions of a body each, by what their names begin with.
PREFIXES: tuple[str, ...] = (
    "porter.AppendCache_",
    "porter.AssignSlots_",
    "porter.CertifiedAttention_",
    "porter.ReadCache_",
)

# As onnx_ir.DataType spells them.
TYPES: frozenset[str] = frozenset(
    """
    FLOAT FLOAT16 BFLOAT16 DOUBLE INT64 INT32 INT16 INT8 UINT8 UINT16 UINT32 UINT64 BOOL FLOAT8E4M3FN
    FLOAT8E5M2 FLOAT8E4M3FNUZ FLOAT8E5M2FNUZ FLOAT8E8M0 FLOAT4E2M1 INT2 INT4 UINT2 UINT4
    """.split()  # noqa: SIM905
)
