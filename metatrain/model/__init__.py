"""The model: sharded tables, features, base learners."""
