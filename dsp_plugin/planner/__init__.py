"""Plans and prices: which dim to shard where, and what it costs on the wire."""
