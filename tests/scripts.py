"""The scripts as modules, for tests that call what is in them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "scripts"
sys.path.append(str(FOLDER))  # where a script finds its neighbours


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", FOLDER / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where the command line looks up its comments
    spec.loader.exec_module(script)
    return script
