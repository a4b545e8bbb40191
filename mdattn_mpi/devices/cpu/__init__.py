"""The CPU device: NumPy computes, MPI carries."""
