"""Optional copies of a run's metrics in TensorBoard, W&B, Trackio or MLflow."""
