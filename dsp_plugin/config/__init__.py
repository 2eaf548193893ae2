"""What a user sets: the schema, what fits together, and the sizes that follow."""
