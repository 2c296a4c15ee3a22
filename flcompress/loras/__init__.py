"""`flcompress remap-lora`: rewrite LoRAs of the teacher for the pruned model."""
