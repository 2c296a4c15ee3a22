"""From a recipe file to checked passes and exporters, with an error message for every fault."""
