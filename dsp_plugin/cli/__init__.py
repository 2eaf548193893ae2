"""The commands of `dsp-plugin`."""
