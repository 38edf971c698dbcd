"""Readers of other projects' measurements: each turns a layout into Ops with seconds (`kvsim.calibrate.rows.Import`)."""
