"""Check an installed wheel: import every module, and read the templates."""

import importlib
import pkgutil
from importlib import resources

import lewis_hub

OF_AN_EXTRA = {"starlette", "uvicorn", "markdown_it"}  # of the embedded Hub
TEMPLATES = ("card.md.j2", "recipe.yaml.j2", "workflows/remerge.yml", "hub/page.html")

imported, left_out = [], []
for module in pkgutil.walk_packages(lewis_hub.__path__, "lewis_hub."):
    if module.name == "lewis_hub.__main__":  # importing it runs the command
        continue
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OF_AN_EXTRA:
            raise
        left_out.append(module.name)
for name in TEMPLATES:
    assert resources.files("lewis_hub.templates").joinpath(name).read_text("utf-8"), name
print(f"imported {len(imported)} modules of {lewis_hub.__path__[0]}")
print(f"left out, since the extra `demo` is not installed: {', '.join(left_out) or 'none'}")
