"""Several machines and servers: hand-over of requests, kept prefixes, and reloaded weights."""
