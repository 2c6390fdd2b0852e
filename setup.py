"""What pyproject.toml cannot say: the folder `conf/` of the checkout is `launcher/conf/` in the wheel."""

import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildAfresh(build_py):
    """Builds without what an earlier build left in `build/lib`: modules and presets since removed would go into the wheel."""

    def run(self) -> None:
        """Copy the packages into an empty folder."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=[*find_packages(include=["launcher*", "train*"]), "launcher.conf"],
    package_dir={"launcher.conf": "conf"},
    cmdclass={"build_py": BuildAfresh},
)
