"""Prints the oldest versions that pyproject.toml promises, as constraints for pip: `make oldest`."""

import re
import tomllib
from pathlib import Path


project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"].values()
for requirement in sorted({*project["dependencies"], *(each for extra in extras for each in extra)}):
    if found := re.match(r"([\w.-]+)>=([\d.]+)", requirement):
        print(f"{found[1]}=={found[2]}")
