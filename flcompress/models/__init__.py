"""What tracing cannot find out: pipeline folders and their parts, example inputs, text and video coding."""

from flcompress.models.inputs import example_inputs as example_inputs
