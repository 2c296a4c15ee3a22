"""The training loop, what it trains, and the methods that passes train by."""
