"""What the passes train and measure; `passes/` declares their arguments."""
