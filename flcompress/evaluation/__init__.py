"""Quality and speed of a finished run, on the embedded moving-digits benchmark."""
