"""Scripts to start from, the training loops that they share, and the data that they make."""
