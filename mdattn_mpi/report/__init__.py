"""A page about a job, and a trace of it, from what its ranks kept in the run folder."""
