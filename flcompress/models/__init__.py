"""Everything that tracing cannot find out: pipeline folders and their parts, example inputs, text and video coding."""
