"""What a program, a pass and an exporter are. Nothing here imports torch."""
