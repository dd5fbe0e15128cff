"""Every shipped config with each argument that its own sweep uses, or those of its GOLDEN where these are too many."""

from pathlib import Path

from experiments import config

ROOT = Path(__file__).parent.parent.parent


def _sources() -> list[str]:
    found = []
    for file in sorted((ROOT / "configs").rglob("*.py")):
        path = str(file.relative_to(ROOT))
        module = config.module(path)
        if hasattr(module, "get_config"):
            every = {job["arg"] for job in module.get_sweep() if "arg" in job}
            arguments = getattr(module, "GOLDEN", every)
            found += [f"{path}:{name}" for name in sorted(arguments)] or [path]
    return found


SOURCES = _sources()
ONE_A_FILE = list({source.partition(":")[0]: source for source in SOURCES}.values())  # the last argument of each
