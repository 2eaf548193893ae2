"""Small reference models, written to be read; none of them knows about parallelism."""
