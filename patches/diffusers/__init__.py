"""Diffusers: plans of its video transformers, which run as they are, and small ones with random weights to plan with.

A plan is known by the model's class, so a config needs nothing but a method and a size. Nothing of diffusers is
imported here: a model's plan is asked for by those who have the model.
"""
