"""Who does which item, and how long a job takes: arithmetic on the one cost model."""
