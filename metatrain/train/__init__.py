"""Training: the loop of a worker, one step, the launch on Ray."""
