"""Where arrays live and travel."""
