"""What a run leaves behind: tables, files, plots and traces; installed as `kvsim.reports`."""
