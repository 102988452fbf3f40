"""The same operations as Triton kernels, file by file beside the plain ones one folder up.

Triton is optional: import these modules only where a CUDA device is in use (or Triton's interpreter, which
runs them on CPU tensors under TRITON_INTERPRET=1). Every launcher names its plain twin, and the tests hold
the two together.

Block sizes are arguments with defaults meant for Hopper; nothing is tuned at import.
"""
