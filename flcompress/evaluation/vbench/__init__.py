"""VBench-I2V: the worker that runs in VBench's own environment, its processes, and what is made of their scores."""
