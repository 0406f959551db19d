"""What a fast-weight node becomes: op schemas, the reference, and the lowerings that implement them."""
