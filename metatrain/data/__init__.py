"""From event logs to task batches: sources, the task dataset, the epoch plan, the readers."""
