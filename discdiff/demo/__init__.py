"""The example: small networks, their training, and data. No other room but adapters and the command needs it."""
