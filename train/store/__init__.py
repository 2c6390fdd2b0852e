"""Files below the root and the cache: their names, how they are written and read, who may write them. Light: no torch."""
