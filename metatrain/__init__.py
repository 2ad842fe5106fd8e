"""metatrain: meta-train recommenders that adapt to a new user from a handful of events."""

__version__ = "0.1.0"
