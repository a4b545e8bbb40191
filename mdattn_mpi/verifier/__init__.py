"""Float64 reference and comparison; knows nothing of strategies and devices."""
