"""Files and folders that are complete or absent, on any file system."""
