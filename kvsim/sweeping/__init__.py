"""Many scenarios from one sweep file: over local cores or a Ray cluster, into a folder that an interrupted sweep goes on from."""
