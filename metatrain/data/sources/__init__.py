"""Raw logs: MovieLens, Netflix Prize, generic events, synthetic."""
