"""What a fleet costs and gives: replicas, a folder of prefixes, weights that change."""
