"""Examples: small networks, their training and their data; in the library only adapters and the command use them."""
