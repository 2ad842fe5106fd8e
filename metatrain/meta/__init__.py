"""Meta-learners and inner-loop engines. Imports torch alone."""
