"""The fast-weight step on GPUs: bookkeeping that never asks the device, and kernels that decide there.

- :mod:`.step`: the door: what can run, and which of the two paths.
- :mod:`.sequence`: calls of several tokens (prefill, chunked prefill, verification of drafts).
- :mod:`.decode`: calls of one token.
- :mod:`.plan`, :mod:`.values`: bookkeeping and v of calls of several tokens, in plain torch.
- :mod:`.schedules`: tiles and numbers of programs.

Nothing here reads a value of a tensor on the host, so a call may be captured into a CUDA graph. Importing it
needs triton.
"""
