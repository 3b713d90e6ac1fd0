"""A wheel of Python and C sources; with DISCDIFF_COMPILE=1 it carries the C compiled too, and is for this platform."""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class ForOnePlatform(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class Compile(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout compiles at first use
            compiled = runpy.run_path(str(Path(__file__).parent / "kernels" / "compiled.py"))
            compiled["build"](Path(self.build_lib, "discdiff", "kernels"))


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # loaded by ctypes: no interpreter's ABI


if os.environ.get("DISCDIFF_COMPILE") == "1":
    setup(distclass=ForOnePlatform, cmdclass={"build_py": Compile, "bdist_wheel": AnyPython})
else:
    setup()
