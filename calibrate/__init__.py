"""Measuring a device, so that the cost model rests on it; installed as `kvsim.calibrate`."""
