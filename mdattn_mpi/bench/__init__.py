"""Benchmarks: one module each, with `add_parser` and `main`; `mdattn bench` registers them."""
