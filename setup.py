"""What pyproject.toml cannot say: the folder `conf/` of the checkout is `launcher/conf/` in the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["launcher*", "train*"]), "launcher.conf"],
    package_dir={"launcher.conf": "conf"},
)
