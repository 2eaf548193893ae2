"""A model run before it is trained: dry, at any number of ranks and without data, or small and compared with itself."""
