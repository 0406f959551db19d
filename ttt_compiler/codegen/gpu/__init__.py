"""The fast-weight ops on GPUs: launches of our kernels, and torch that never asks the device a question.

- :mod:`.scan`, :mod:`.conv`, :mod:`.controls`: the stateless ops, op by op; graphs use the lowerings.
- :mod:`.library`: the scan by library products, which graphs call where that is predicted to be faster.
- :mod:`.step`: the stateful step's door: what can run, and which of the two paths.
- :mod:`.sequence`: calls of several tokens (prefill, chunked prefill, verification of drafts).
- :mod:`.decode`: calls of one token.
- :mod:`.plan`, :mod:`.values`: bookkeeping and v of calls of several tokens, in plain torch.
- :mod:`.schedules`: tiles and numbers of programs.

Nothing here reads a value of a tensor on the host, so a call may be captured into a CUDA graph. Importing
what launches kernels needs triton.
"""
