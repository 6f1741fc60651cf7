"""What we decide together: manifest, view, routing, placement and sessions over a chain of hops."""
