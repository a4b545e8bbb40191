"""Benchmarks: a module with `add_options` and `main` is one; `mdattn bench` finds it."""
