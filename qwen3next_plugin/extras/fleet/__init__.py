"""Several machines and servers: nodes, Ray, requests handed over, prefixes in a folder."""
