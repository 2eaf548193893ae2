"""Hooks on unmodified modules: whole sequences go in and come out, shards are inside."""
