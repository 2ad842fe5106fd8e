"""The meta-learner of docs/adding-a-meta-learner.md as a module that a recipe names by its import path."""

from tests.pages import example_meta_learner

exec(compile(example_meta_learner(), __file__, "exec"))
