"""Is an output right? Float64 attention over the dataset, and checksums, against what was written.

Nothing here knows how an output was computed: this room imports the problem and the files alone.
"""
