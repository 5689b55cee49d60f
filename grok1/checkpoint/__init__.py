"""Files on disk: their formats, and the way from them to devices."""
