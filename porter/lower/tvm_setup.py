"""Import TVM the way porter needs it; import this before anything of TVM."""

import os
import sys

# TVM reads these when it starts. Pinned workers would fight over one core when several programs run; and the
# exchange of tensors with PyTorch, which porter does not use, would compile an extension into the user's
# home.
os.environ.setdefault("TVM_BIND_THREADS", "0")
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

# TVM imports PyTorch where it is installed: seconds of start-up for nothing.
_hide = "torch" not in sys.modules
if _hide:
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    import tvm  # noqa: F401
finally:
    if _hide:
        del sys.modules["torch"]
