"""Real networks: kits for every participant, the server behind its gate, devices at the edge. Nothing here at import."""
