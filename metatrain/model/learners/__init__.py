"""Base learners: modules that score one event's inputs with given weights."""
