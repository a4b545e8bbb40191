"""FlashAttention 4, compiled here once a kind of call and launched on raw addresses.

We rely on these things of the pinned packages, and tests/unit/devices/cuda/test_flash_contract.py
says each of them: the class of the SM 9.0 kernel, its arguments and what a subclass may change;
compiling without a GPU; an object file that holds the result and can be loaded again; and the C
calling convention of TVM FFI, by which it is called with DLPack's tensors and a bare stream.
"""
