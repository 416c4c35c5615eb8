"""From files and data sets to records."""
