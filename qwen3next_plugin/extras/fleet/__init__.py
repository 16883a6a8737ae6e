"""Several servers: requests handed over, prefixes in a folder."""
