"""`kvsim validate`: predictions beside experiments that others ran. No constant of the simulator may be tuned to a row in here."""
