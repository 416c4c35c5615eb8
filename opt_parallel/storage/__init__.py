"""What lies on a disk, whatever disk it is: files and folders that are complete or absent."""
