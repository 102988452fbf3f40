"""The explicit package list of pyproject.toml names every package there is, and no other."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_an_init_file_is_packaged() -> None:
    folders = [ROOT / folder for folder in SETUPTOOLS["package-dir"].values()]
    found = {
        ".".join(("aquifer", *init.parent.relative_to(ROOT).parts))
        for folder in folders
        for init in folder.rglob("__init__.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def test_every_package_is_importable_under_its_installed_name() -> None:
    for name in SETUPTOOLS["packages"]:
        assert find_spec(name) is not None, name


def test_package_data_exists() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / Path(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"
