"""`kvsim calibrate device`: any device that torch can use becomes a device file and a profile (docs/calibration.md)."""
