"""What a token costs alone, computed some tokens at a time: the head and its loss, and MLPs."""
