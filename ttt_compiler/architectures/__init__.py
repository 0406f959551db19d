"""Every architecture of transformers, in tiny: building, auditing, and the table in the docs."""
