"""Ranks that watch each other, and end a run together when one is lost."""
