"""What a model holds, found by running it: the recording backend, the token probe, the findings."""
