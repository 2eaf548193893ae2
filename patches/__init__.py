"""Everything that touches an upstream package: one folder per framework, one module per seam of it."""
