"""The kinds of masks: each file of this folder makes one known. None imports torch before it draws."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
