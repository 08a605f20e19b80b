"""Port a model from PyTorch to an accelerator it was not made for, and say what the port costs."""

import os

__version__ = "0.1.0"

# ONNX Runtime reads this when it is imported. Without it, its Linux packages since 1.29 keep an identifier
# in the user's files and send events over the network; porter does neither.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
