"""Real kernels of the compression policies; installed as `kvsim.kernels`."""
