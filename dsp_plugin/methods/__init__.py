"""The table of methods. Adding one is one file and one line here."""

from dsp_plugin.methods import dsp, ulysses
from dsp_plugin.methods.method import Method, WireBytes, Workload

METHODS: dict[str, Method] = {method.name: method for method in (dsp.METHOD, ulysses.METHOD)}

__all__ = ["METHODS", "Method", "WireBytes", "Workload"]
