"""The packages: the folders of ``package_dir`` in setup.cfg, which has everything else, and those below them.

Found here because setuptools finds declaratively only packages that are named as their folders are, and three are not.
"""

from configparser import ConfigParser

from setuptools import find_packages, setup

config = ConfigParser()
config.read("setup.cfg")
packages = []
for line in config["options"]["package_dir"].split("\n"):
    package, _, folder = line.partition(" = ")
    if package:
        packages += [package, *(f"{package}.{below}" for below in find_packages(folder))]

setup(packages=packages)
