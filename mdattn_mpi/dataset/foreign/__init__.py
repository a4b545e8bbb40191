"""Other people's files: .npz, .npy, .safetensors, .pt, any HDF5; and what items they make.

Nothing here runs code of theirs. Every format says what it holds in a header; no header is believed
before its claims have been compared with the size of the file.
"""
