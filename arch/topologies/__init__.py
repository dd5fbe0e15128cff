"""Topologies, one a file; importing this package imports them all, which fills TOPOLOGIES."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
