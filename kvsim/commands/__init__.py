"""Commands, one file each or one for a group; light to import: what is heavy is imported when a command runs."""
