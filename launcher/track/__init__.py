"""Where every run is, read from files. The way in is `tracker.track`."""
