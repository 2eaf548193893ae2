"""`make bench`: what the methods cost, as ratios measured side by side in one run. See ``results/README.md``."""
