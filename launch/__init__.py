"""Starting a user's unmodified script with the plugin in place: ``python -m dsp_plugin.launch SCRIPT ARGS``."""
