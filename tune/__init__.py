"""The cluster: Ray Tune and Ray Train, Optuna, MLflow. Knows no tensors; `richkd` does the science."""
