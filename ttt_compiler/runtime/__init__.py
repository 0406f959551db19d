"""State of running sequences: layout, caches, sessions, snapshots."""
