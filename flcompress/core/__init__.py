"""What a program, a pass and an exporter are, and the settings that they share."""
