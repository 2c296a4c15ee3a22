"""`flcompress plan`: memory, time and the settings that fit."""
