"""The CUDA device: a GPU a rank; imported only where one is to be opened."""
