"""Programs, passes and exporters, and the settings that they share."""
