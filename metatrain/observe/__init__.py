"""What a run shows of itself: TensorBoard, progress, environment report."""
