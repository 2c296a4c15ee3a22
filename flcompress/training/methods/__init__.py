"""The trainings and measurements of the passes; `passes/` declares their arguments."""
