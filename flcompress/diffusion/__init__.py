"""The mathematics: flow matching, guidance, distribution matching, schedulers, the sampling contract."""
