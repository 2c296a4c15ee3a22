"""Model families: what tracing cannot find out. One module a family; `family_of` finds it by a class name."""

from flcompress.models.families.registry import family_of as family_of
from flcompress.models.families.registry import find_family as find_family
from flcompress.models.families.registry import known_families as known_families
from flcompress.models.families.registry import register_family as register_family
