"""What this cluster and this machine will do with a sweep, before there is one. The way in is `examine.examine`."""
