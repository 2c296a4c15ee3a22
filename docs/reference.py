"""Write docs/recipes.md and recipes/schema.json from the classes that read recipes: `python docs/reference.py`."""

from __future__ import annotations

import json
from pathlib import Path

from flcompress.frontend.reference import recipe_schema, reference_markdown

ROOT = Path(__file__).resolve().parent.parent


def generated() -> dict[Path, str]:
    """File -> what it must hold."""
    return {
        ROOT / "docs" / "recipes.md": reference_markdown(),
        ROOT / "recipes" / "schema.json": json.dumps(recipe_schema(), indent=1) + "\n",
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
